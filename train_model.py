# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "numpy==2.4.6", "tensorflow==2.21.0"]
# ///
"""Train the classifier of handwritten digits that the benchmarks load.

The code is from "10x faster parallel Python without Python multiprocessing", benchmark 3,
"expensive initialization". Writes the model and, unless they exist, the data.

    python train_model.py                       # MNIST; where it cannot be fetched, a stand-in
    python train_model.py --stand-in            # the stand-in at once
    python train_model.py --data my/mnist.npz   # data that exist are used as they are

The data are four arrays, as in Keras's mnist.npz: images x_train and x_test (count, 28, 28) with
values from 0 to 255, and their labels y_train and y_test (count,), from 0 to 9.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import sys
import tempfile
import zipfile

import numpy as np

# Before TensorFlow is imported; whatever the user exports for other programs.
os.environ.update(
    CUDA_VISIBLE_DEVICES="-1",  # No GPU: this is about processor cores.
    KERAS_BACKEND="tensorflow",
    MPLBACKEND="agg",  # Keras imports Matplotlib, and fails if a notebook's is not installed.
    TF_CPP_MIN_LOG_LEVEL="3",  # Errors only.
    TF_USE_LEGACY_KERAS="0",  # Keras 3, not 2.
)
if os.path.expanduser("~") == "~":  # No home: Keras would make a folder of this name.
    os.environ["HOME"] = tempfile.gettempdir()


def train(datafile, filename):
    """Train the article's model, save it, and return its accuracy on the test images."""
    os.environ["KERAS_HOME"] = os.devnull  # Hides ~/.keras/keras.json, which can alter a model.
    import tensorflow as tf  # Here: a mistyped argument need not wait for it.

    tf.keras.utils.set_random_seed(0)  # The same data give the same weights on the same machine.

    mnist = dict(np.load(datafile))
    x_train, y_train = mnist["x_train"], mnist["y_train"]
    x_train = x_train / 255.0
    model = tf.keras.models.Sequential(
        [
            tf.keras.layers.Input(shape=(28, 28)),  # Keras 3 warns of the article's input_shape.
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(512, activation="relu"),
            tf.keras.layers.Dropout(0.2),
            tf.keras.layers.Dense(10, activation="softmax"),  # Keras cannot load tf.nn.softmax.
        ]
    )
    model.compile(
        optimizer="adam",
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    # Train the model.
    model.fit(x_train, y_train, epochs=1, verbose=0)  # A progress bar would fill a log.
    # Save the model to disk.
    model.save(filename)

    x_test, y_test = mnist["x_test"], mnist["y_test"]
    loss, accuracy = model.evaluate(x_test / 255.0, y_test, verbose=0)
    return accuracy


def main():
    parser = argparse.ArgumentParser(description="Train the classifier that the benchmarks load.")
    parser.add_argument("--model", default="/tmp/model.keras", help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument("--stand-in", action="store_true", help="do not try to fetch MNIST")
    arguments = parser.parse_args()
    model, data = arguments.model, arguments.data
    if not model.endswith(".keras") or not data.endswith(".npz"):
        parser.error("--model must end in .keras, and --data in .npz")

    if not os.path.exists(data):
        with replacing(data) as new_file:
            mnist = draw_stand_in() if arguments.stand_in else fetch_or_draw()
            np.savez_compressed(new_file, **mnist)
    problem = problem_of(data)
    if problem:
        sys.exit(f"{data}: {problem}; name other data, or move this file away")

    with replacing(model) as new_file:
        accuracy = train(data, new_file)
    kind = kind_of(data)
    if kind == "stand-in":
        remedy = f"remove {data} to try for MNIST again"
        print(f"WARNING: the data are a stand-in, not MNIST; {remedy}", file=sys.stderr)
    print(f"test accuracy {accuracy:.4f}, data: {kind} ({data}), model: {model}")


def fetch_or_draw(seconds=60):
    """Return MNIST's arrays by name; if they do not come in time, tell why and draw a stand-in."""
    with multiprocessing.Pool(1) as pool:  # A process can be ended wherever it hangs.
        try:
            return pool.apply_async(load_mnist).get(seconds)
        except multiprocessing.TimeoutError:
            reason = f"no answer within {seconds} s"
        except Exception as error:
            reason = error
    print(f"no MNIST ({reason}): drawing a stand-in", file=sys.stderr)
    return draw_stand_in()


def load_mnist():
    """Return MNIST's arrays by name: from Keras's cache, or from the network."""
    import tensorflow as tf

    (x_train, y_train), (x_test, y_test) = tf.keras.datasets.mnist.load_data()
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def draw_stand_in(training=60_000, test=10_000):
    """Draw images for the training and for the test; return four arrays like MNIST's, by name.

    Each digit has a random pattern of black and white pixels. An image shows the pattern of its
    digit with 0 to 46% of the pixels inverted: the noisiest cannot be recognized. All arithmetic
    is on integers, so the bytes are the same on every machine.
    """
    count = training + test
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2, (10, 28, 28), "uint8")
    labels = generator.integers(0, 10, count, "uint8")
    percent_inverted = generator.integers(0, 47, (count, 1, 1), "uint8")
    inverted = generator.integers(0, 100, (count, 28, 28), "uint8") < percent_inverted
    images = 255 * (patterns[labels] ^ inverted)
    return {
        "x_train": images[:training],
        "y_train": labels[:training],
        "x_test": images[training:],
        "y_test": labels[training:],
    }


def problem_of(datafile):
    """Return in words why the benchmarks cannot use a file, or None if they can."""
    if not zipfile.is_zipfile(datafile):
        return "this cannot be read as an .npz file"
    mnist = {}
    for name in ["x_train", "y_train", "x_test", "y_test"]:
        try:
            mnist[name] = np.load(datafile)[name]
        except Exception as error:  # It is missing or damaged, or would have to be unpickled.
            return f"{name} cannot be read ({error})"

    for part in ["train", "test"]:
        x, y = mnist[f"x_{part}"], mnist[f"y_{part}"]
        if x.shape[1:] != (28, 28) or len(x) == 0:
            return f"x_{part} has the shape {x.shape} and not (count, 28, 28)"
        # The scripts divide by 255: whoever made the file must not have done so. NaN fails too.
        if not (x.min() >= 0 and 1 < x.max() <= 255):
            return f"x_{part} has values from {x.min()} to {x.max()} and not from 0 to 255"
        if y.shape != (len(x),):
            return f"y_{part} has the shape {y.shape}, but there are {len(x)} images in x_{part}"
        if not np.isin(y, range(10)).all():
            return f"y_{part} has labels other than 0 to 9"
    return None


# Known data, by the SHA-256 of the bytes of x_test, x_train, y_test and y_train, in this order.
KINDS = {
    "c868f4cc70f1ec2961bd3b26437ea3a5d0e93cba4d95b336c6d475dd9dabb021": "MNIST",
    "2a982b4d28ef60434f194f9fd91b5d8a5d6318f5c063b7fb63b6c83b05ac52d3": "stand-in",
}


def kind_of(datafile):
    """Return "MNIST", "stand-in" or "other"."""
    digest = hashlib.sha256()
    mnist = np.load(datafile)
    for name in ["x_test", "x_train", "y_test", "y_train"]:
        digest.update(mnist[name].tobytes())
    return KINDS.get(digest.hexdigest(), "other")


@contextlib.contextmanager
def replacing(path):
    """Yield the name of a file to be written, which then takes the place of `path`.

    After an exception nothing of it is left. A link is replaced, not followed: in /tmp anybody
    can have put it there.
    """
    beside = os.path.dirname(path) or "."
    with tempfile.TemporaryDirectory(prefix="train_model-", dir=beside) as folder:
        new_file = os.path.join(folder, os.path.basename(path))
        yield new_file
        os.replace(new_file, path)


if __name__ == "__main__":
    main()
