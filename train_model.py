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
labels, y_train and y_test; the stand-in also has `stand_in`. Files appear whole, and only after the training.
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
for name in ("KERAS_MAX_STEPS_PER_EPOCH", "KERAS_NNX_ENABLED", "TF_XLA_FLAGS"):
    os.environ.pop(name, None)
# No GPU: this is about processor cores.
os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "0", "CUDA_VISIBLE_DEVICES": "-1"}
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
warnings.simplefilter("ignore")  # PYTHONWARNINGS=error would make Keras fail.


def train(mnist, filename):
    """Train the classifier, save it to the file `filename`, and return its accuracy on the test images."""
    os.environ["KERAS_HOME"] = os.devnull  # Hides ~/.keras/keras.json, which can make Keras compute otherwise.
    import tensorflow as tf  # Not at the top: a mistyped argument must not wait for it.

    tf.keras.utils.set_random_seed(0)
    x_train = mnist["x_train"] / 255.0
    model = tf.keras.models.Sequential(
        [
            tf.keras.layers.Input(shape=(28, 28)),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(512, activation="relu"),
            tf.keras.layers.Dropout(0.2),
            tf.keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    # verbose=0: Keras's progress bar would fill a log with thousands of lines.
    model.fit(x_train, mnist["y_train"], epochs=1, verbose=0)
    model.save(filename)
    return model.evaluate(mnist["x_test"] / 255.0, mnist["y_test"], verbose=0)[1]  # of loss and accuracy


# The data

MNIST_SHA256 = "c868f4cc70f1ec2961bd3b26437ea3a5d0e93cba4d95b336c6d475dd9dabb021"  # of its arrays' bytes

# For a process of its own, which can be killed wherever it hangs. get_file finds what load_data has just stored.
DOWNLOAD = """
import shutil, sys, keras
keras.datasets.mnist.load_data()
shutil.copyfile(keras.utils.get_file("mnist.npz", origin="cached"), sys.argv[1])
"""

# The digits 0 to 9 of the stand-in. A numeral is a row of three pixels in binary: 7 is ###, 5 is #.#, 2 is .#.
DIGITS = "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717"


def data_kind(mnist):
    """Return "mnist", "stand-in" or "other", by the content of the arrays."""
    arrays = b"".join(mnist[name].tobytes() for name in ("x_test", "x_train", "y_test", "y_train"))
    kind = "stand-in" if "stand_in" in mnist else "other"
    return "mnist" if hashlib.sha256(arrays).hexdigest() == MNIST_SHA256 else kind


def download(data, seconds=60):
    """Have Keras's loader write MNIST to the file `data`. Return whether it did; if not, print the reason."""
    print(f"fetching MNIST by Keras's loader, for {seconds} s at most", file=sys.stderr)
    reason = "no answer in time"
    with contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, "-P", "-c", DOWNLOAD, data]
        reason = subprocess.run(command, capture_output=True, text=True, timeout=seconds).stderr
    if not os.path.exists(data):
        print("no MNIST:", *reason.splitlines()[-1:], file=sys.stderr)
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
    low = [-0.6, 2.2, 2.2, 10, 10, 0.2, 0.5]
    high = [0.6, 4.4, 4.4, 17, 17, 0.6, 1]
    variations = generator.uniform(low, high, (count, 7)).astype(np.float32)
    images = np.empty((count, 28, 28), np.float32)
    for image, label, (slant, height, width, down, right, thin, ink) in zip(images, labels, variations, strict=True):
        # From a pixel of the image to one of the digit, whose centre is at (3, 2).
        matrix = np.array([[1 / height, -slant / height], [slant / width, 1 / width]])
        offset = np.array([3, 2]) - (matrix * [down, right]).sum(axis=1)
        ndimage.affine_transform(digits[label], matrix, offset, output=image, order=1)
        image[:] = (4 * (image - thin)).clip(0, ink)
    images = (images * (200 + 55 * generator.random(images.shape, np.float32))).astype(np.uint8)
    x_train, x_test = np.split(images, [-10000])
    y_train, y_test = np.split(labels, [-10000])
    np.savez_compressed(data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, stand_in=True)


# The files


@contextlib.contextmanager
def new_file(path):
    """Yield the path of a file to be written, which then takes the place of `path`; after an exception it vanishes.

    If `path` is a link, the link is replaced, not the file to which it leads: in /tmp anybody may have made it.
    """
    with tempfile.TemporaryDirectory(prefix=".train_model-", dir=os.path.dirname(path) or ".") as folder:
        part = os.path.join(folder, os.path.basename(path))
        yield part
        os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description="Train the article's digit classifier.")
    parser.add_argument("--model", default="/tmp/model.keras", help="where to save the model (%(default)s)")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="used if it exists, else written (%(default)s)")
    parser.add_argument("--stand-in", action="store_true", help="do not try to fetch MNIST: draw a stand-in")
    arguments = parser.parse_args()
    model, data = arguments.model, arguments.data
    if not model.endswith(".keras") or not data.endswith(".npz"):
        parser.error("the names have to end in .keras (--model) and in .npz (--data)")
    for number in (signal.SIGINT, signal.SIGTERM):  # By an exception, so that nothing half-written stays.
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        with contextlib.ExitStack() as files:
            source = data
            if not os.path.exists(data):
                source = files.enter_context(new_file(data))
            new_model = files.enter_context(new_file(model))
            if source != data and (arguments.stand_in or not download(source)):
                draw_stand_in(source)
            mnist = dict(np.load(source))
            kind = data_kind(mnist)
            if kind == "stand-in":
                print(f"WARNING: {data} IS A STAND-IN, NOT MNIST: remove it to try for MNIST again", file=sys.stderr)
            accuracy = train(mnist, new_model)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        # NumPy's second sentence can be advice to unpickle a foreign file.
        cause = str(error).strip().replace("\n", ". ").split(". ")[0]
        files = f"model {model}, data {data}: x_train, y_train, x_test, y_test, images of 28 x 28 pixels, 0 to 255"
        sys.exit(f"{type(error).__name__}: {cause} ({files}; python -X dev tells more)")
    print(f"test accuracy {accuracy:.4f}, data: {kind} ({data}), model: {model}")


if __name__ == "__main__":
    main()
