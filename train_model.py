# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["keras==3.15.1", "numpy==2.4.6", "scipy==1.17.1", "tensorflow==2.21.0"]
# ///
"""Train the article's digit classifier once and leave the two files that the benchmarks read: a model and MNIST.

The code is from "10x faster parallel Python without Python multiprocessing", part 2, benchmark 3 ("expensive
initialization"), with what Keras 3 asks for: a name that ends in .keras, an Input layer, and activations by name. It is
seeded: the same data give the same weights on the same machine.

    python train_model.py                       # MNIST by Keras's loader; without a network, a drawn stand-in
    python train_model.py --stand-in            # the stand-in at once
    python train_model.py --data my/mnist.npz   # a file that exists is used as it is

Writes the model and, unless they exist, the data: 60,000 images of 28 x 28 uint8, x_train, 10,000, x_test, and their
labels, y_train and y_test. Files appear whole, and only after the training.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import warnings

import numpy as np
from scipy import ndimage

# What the environment tells other programs that use Keras and TensorFlow must not change or break the training.
for name in set(os.environ) - {"KERAS_HOME"}:  # Keras keeps MNIST there.
    if name.startswith(("KERAS_", "TF_")):
        del os.environ[name]
# No GPU: this is about processor cores.
os.environ |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
warnings.simplefilter("ignore")  # PYTHONWARNINGS=error would make Keras fail.


def train(mnist, filename):
    """Train the classifier, save it to the file `filename`, and return its accuracy on the test images."""
    os.environ["KERAS_HOME"] = os.devnull  # Hides ~/.keras/keras.json, which can make Keras compute otherwise.
    import tensorflow as tf  # Not at the top: a mistyped argument must not wait for it.

    tf.keras.utils.set_random_seed(0)
    x_train = mnist["x_train"] / 255.0
    model = tf.keras.models.Sequential(
        [
            tf.keras.layers.Input(shape=(28, 28)),  # Keras 3 warns of the article's input_shape=.
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(512, activation="relu"),
            tf.keras.layers.Dropout(0.2),
            tf.keras.layers.Dense(10, activation="softmax"),  # Keras 3 saves tf.nn.softmax but cannot load it.
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    # verbose=0: Keras's progress bar would fill a log with thousands of lines.
    model.fit(x_train, mnist["y_train"], epochs=1, verbose=0)
    model.save(filename)
    return model.evaluate(mnist["x_test"] / 255.0, mnist["y_test"], verbose=0)[1]  # of loss and accuracy


def main():
    parser = argparse.ArgumentParser(description="Train the article's digit classifier.")
    parser.add_argument("--model", default="/tmp/model.keras", help="where to save the model (%(default)s)")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="used if it exists, else written (%(default)s)")
    parser.add_argument("--stand-in", action="store_true", help="do not try to fetch MNIST: draw a stand-in")
    arguments = parser.parse_args()
    model, data = arguments.model, arguments.data
    if not model.endswith(".keras") or not data.endswith(".npz"):
        parser.error("the names have to end in .keras (--model) and in .npz (--data)")

    def explain(cls, error, traceback):
        why = [line for line in str(error).splitlines() if line and "[[" not in line]  # Nodes of a graph have [[.
        print(f"{cls.__name__}:", *why[-1:], f"(model {model}, data {data}; python -X dev tells more)", file=sys.stderr)

    sys.excepthook = sys.excepthook if sys.flags.dev_mode else explain
    for number in (signal.SIGINT, signal.SIGTERM):  # By an exception, so that nothing half-written stays.
        signal.signal(number, lambda received, frame: sys.exit(128 + received))

    with contextlib.ExitStack() as files:
        source = data
        if not os.path.exists(data):
            source = files.enter_context(new_file(data))
        new_model = files.enter_context(new_file(model))
        if source != data and (arguments.stand_in or not download(source)):
            draw_stand_in(source)
        mnist = read(source)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in mnist.values())).hexdigest()
        kind = KINDS.get(digest[:16], "other")
        if kind == "stand-in":
            print(f"WARNING: {data} IS A STAND-IN, NOT MNIST: remove it to try for MNIST again", file=sys.stderr)
        accuracy = train(mnist, new_model)
    print(f"test accuracy {accuracy:.4f}, data: {kind} ({data}), model: {model}", flush=True)


@contextlib.contextmanager
def new_file(path):
    """Yield the path of a file to be written, which then takes the place of `path`; after an exception it vanishes.

    If `path` is a link, the link is replaced, not the file to which it leads: in /tmp anybody may have made it.
    """
    with tempfile.TemporaryDirectory(prefix=".train_model-", dir=os.path.dirname(path) or ".") as folder:
        part = os.path.join(folder, os.path.basename(path))
        yield part
        os.replace(part, path)


# The data

NEEDED = "x_train and x_test must be images (count, 28, 28) with values 0 to 255, y_train and y_test labels 0 to 9"
KINDS = {"c868f4cc70f1ec29": "mnist", "f7c6aaddfd20069b": "stand-in"}  # by the first digits of the arrays' SHA-256

# For a process of its own, which can be killed wherever it hangs. get_file finds what load_data has just stored.
DOWNLOAD = """import shutil, sys, keras
keras.datasets.mnist.load_data()
shutil.copyfile(keras.utils.get_file("mnist.npz", origin="cached"), sys.argv[1])"""

# The digits 0 to 9 of the stand-in. A numeral is a row of three pixels in binary: 7 is ###, 5 is #.#, 2 is .#.
DIGITS = "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717"


def read(data):
    """Return the arrays of the file `data` by name, sorted. Raise ValueError if they are unlike MNIST's."""
    try:
        mnist = {name: np.load(data)[name] for name in ("x_test", "x_train", "y_test", "y_train")}
        for x, y in (mnist["x_test"], mnist["y_test"]), (mnist["x_train"], mnist["y_train"]):
            # The benchmarks divide x by 255: who made the file must not have done so.
            if x.shape != (y.size, 28, 28) or x.min() < 0 or not 1 < x.max() <= 255 or set(y.flat) - set(range(10)):
                raise ValueError(f"images {x.shape}, {x.min()} to {x.max()}; labels {y.shape}")
    except Exception as error:  # Its words are left out: NumPy's can be advice to unpickle a foreign file.
        raise ValueError(f"{NEEDED} ({type(error).__name__}); name other data or move these away") from error
    return mnist


def download(data, seconds=60):
    """Have Keras's loader write MNIST to the file `data`. Return whether it did; if not, print the reason."""
    print(f"fetching MNIST by Keras's loader, for {seconds} s at most", file=sys.stderr)
    reason = [f"no answer within {seconds} s"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, "-P", "-c", DOWNLOAD, data]
        reason = subprocess.run(command, capture_output=True, text=True, timeout=seconds).stderr.splitlines()
    if not os.path.exists(data):
        print("no MNIST:", *reason[-1:], file=sys.stderr)
    return os.path.exists(data)


def draw_stand_in(data, count=70000):
    """Draw `count` digits, the last 10,000 of them for the test, and write them to the file `data` in place of MNIST.

    The bytes are the same on every machine: there is no sine, logarithm or product of matrices here, whose last bit
    depends on the processor.
    """
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    digits = [np.pad([[int(row) & bit > 0 for bit in (4, 2, 1)] for row in digit], 1) for digit in DIGITS.split()]
    # Slant; height and width of a digit's pixel, and its centre, in pixels of the image; thinness; ink.
    ranges = [(-0.6, 0.6), (2.2, 4.4), (2.2, 4.4), (10, 17), (10, 17), (0.2, 0.6), (0.5, 1)]
    variations = generator.uniform(*np.transpose(ranges), (count, 7)).astype(np.float32)
    images = np.empty((count, 28, 28), np.float32)
    for image, label, (slant, height, width, down, right, thin, ink) in zip(images, labels, variations, strict=True):
        # From a pixel of the image to one of the digit, whose centre is at (3, 2).
        matrix = np.array([[1 / height, -slant / height], [slant / width, 1 / width]])
        offset = np.array([3, 2]) - (matrix * [down, right]).sum(axis=1)
        ndimage.affine_transform(digits[label], matrix, offset, output=image, order=1)
        image[:] = (4 * (image - thin)).clip(0, ink)
    images = (images * (200 + 55 * generator.random(images.shape, np.float32))).astype(np.uint8)
    training = {"x_train": images[:-10000], "y_train": labels[:-10000]}
    np.savez_compressed(data, **training, x_test=images[-10000:], y_test=labels[-10000:])


if __name__ == "__main__":
    main()
