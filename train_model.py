"""Train the article's digit classifier once and leave the two files that the benchmarks read: a model and MNIST.

The code is from "10x faster parallel Python without Python multiprocessing", part 2, benchmark 3 ("expensive
initialization"), which shows it as the way in which its model was made.

Differences from the article:
- the model is saved as `/tmp/model.keras`: Keras 3 refuses a name without an extension;
- `activation="softmax"` instead of `tf.nn.softmax`: Keras 3 saves that, but can't load it again;
- an `Input` layer instead of `input_shape=`, about which Keras 3 warns;
- the data is left as `/tmp/mnist.npz`, which the benchmarks read, so that none of them needs the network;
- seeded: the same data and the same machine give the same weights.

    python train_model.py                       # MNIST by Keras's loader; where it can't be had, a drawn stand-in
    python train_model.py --stand-in            # the stand-in; no network
    python train_model.py --data my/mnist.npz   # a file that exists is used as it is
    python train_model.py --model my.keras      # save the model elsewhere

It prints the test accuracy and writes `/tmp/model.keras` and, unless it was there, `/tmp/mnist.npz` (arrays x_train,
y_train, x_test, y_test: 60000 and 10000 images of 28x28 uint8 and their labels; in the stand-in, `stand_in` as well).
Each file appears whole or not at all. Exit status: 0, 1 (a file or its content), 2 (usage), 130 and 143 (stopped).
"""

import os

# TensorFlow reads these when it is imported. Level 3, because at 2 a machine without a graphics card hears that CUDA
# can't be initialised; what goes wrong in TensorFlow arrives as a Python exception, and what aborts it is printed. And
# no graphics card where there is one, because the benchmark is about processor cores.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import argparse
import contextlib
import hashlib
import signal
import subprocess
import sys
import tempfile
import zipfile

# snippet: start
import numpy as np


def train(mnist, filename):
    """Train the classifier on mnist["x_train"] and mnist["y_train"], save it to the file `filename` and return it."""
    import tensorflow as tf  # not at the top: it takes seconds, and a mistyped argument deserves an answer at once

    tf.keras.utils.set_random_seed(0)
    x_train, y_train = mnist["x_train"], mnist["y_train"]
    x_train = x_train / 255.0
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
    # Train the model.
    model.fit(x_train, y_train, epochs=1)
    # Save the model to disk.
    model.save(filename)
    return model


# snippet: end

# The SHA-256 of the file that Keras's loader accepts as MNIST (it stands in keras/src/datasets/mnist.py).
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
SHAPES = {"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)}  # all uint8
# The digits 0 to 9 of the stand-in.
DIGITS = (
    "###/#.#/#.#/#.#/### .#./##./.#./.#./### ###/..#/###/#../### ###/..#/###/..#/### #.#/#.#/###/..#/..# "
    "###/#../###/..#/### ###/#../###/#.#/### ###/..#/..#/.#./.#. ###/#.#/###/#.#/### ###/#.#/###/..#/###"
)
# For a process of its own, which the kernel ends after 60 seconds wherever it hangs: from the script's own process, the
# look-up of a name can't be cut short. get_file() finds what load_data() has checked and cached; it fetches nothing.
DOWNLOAD = """
import shutil, signal, sys, tensorflow as tf
signal.alarm(60)
tf.keras.datasets.mnist.load_data()
shutil.copyfile(tf.keras.utils.get_file("mnist.npz", origin="cached"), sys.argv[1])
"""


def data_kind(data):
    """Return what the npz file `data` holds, known by its content: "mnist", "stand-in" or "other"."""
    with open(data, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == MNIST_SHA256:
            return "mnist"
    return "stand-in" if "stand_in.npy" in zipfile.ZipFile(data).namelist() else "other"


def download(data):
    """Have Keras's loader leave the real mnist.npz at `data`. Return whether it did; if not, say why."""
    print("fetching MNIST, for a minute at most", file=sys.stderr)
    done = subprocess.run([sys.executable, "-P", "-c", DOWNLOAD, data], capture_output=True, text=True)
    if done.returncode:  # -14: ended by the alarm
        print("NO MNIST:", "too slow" if done.returncode == -14 else done.stderr.split("\n")[-2:][0], file=sys.stderr)
    return done.returncode == 0


def draw_stand_in(data, count=70000):
    """Draw `count` digits, the last 10000 for the test, and write them to the file `data` (.npz) in place of MNIST.

    Each is turned, stretched, moved, and differs in stroke, ink and grain. The bytes are the same each time: there is
    no sine, no logarithm, no matrix product in it, whose last bit depends on the machine.
    """
    from scipy import ndimage

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    glyphs = [np.pad(np.array([*digit.replace("/", "")]).reshape(5, 3) == "#", 1) for digit in DIGITS.split()]
    low, high = [-0.6, 2.2, 2.2, 10, 10, 0.2, 0.5], [0.6, 4.4, 4.4, 17, 17, 0.6, 1]
    slant, height, width, down, right, stroke, ink = generator.uniform(low, high, (count, 7)).T.astype(np.float32)
    matrices = np.array([[1 / height, -slant / height], [slant / width, 1 / width]]).transpose(2, 0, 1)
    images = np.empty((count, 28, 28), np.float32)
    for image, label, matrix, *centre in zip(images, labels, matrices, down, right, strict=True):
        ndimage.affine_transform(glyphs[label], matrix, [3, 2] - (matrix * centre).sum(axis=1), output=image, order=1)
    images = (4 * (images - stroke[:, None, None])).clip(0, ink[:, None, None])
    images = (images * (200 + 55 * generator.random(images.shape, np.float32))).astype(np.uint8)
    (x_train, x_test), (y_train, y_test) = np.split(images, [-10000]), np.split(labels, [-10000])
    np.savez_compressed(data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, stand_in=True)


def read(data):
    """Return the arrays of the npz file `data` that SHAPES names; exit with a message if they are not as it says."""
    try:
        # ZipFile has a say first, because NumPy's words about a file that isn't a zip are an advice to unpickle it.
        with zipfile.ZipFile(data), np.load(data, allow_pickle=False) as file:
            mnist = {name: file[name] for name in SHAPES}
        for name, array in mnist.items():
            if (array.dtype, array.shape) != (np.uint8, SHAPES[name]) or (array.ndim == 1 and array.max() > 9):
                raise ValueError(f"{name} has to be uint8 {SHAPES[name]}, labels 0 to 9")
    except Exception as error:  # whatever the bytes of a foreign file lead to
        sys.exit(f"{data} doesn't hold MNIST's four arrays ({error}): remove it, or name another file with --data")
    return mnist


@contextlib.contextmanager
def whole(path, name):
    """Yield the path of a new file called `name`, which then takes the place of `path`; on an error it vanishes.

    Exits with a message where `path` can't be written.
    """
    target = os.path.realpath(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=os.path.dirname(target)) as folder:
            part = os.path.join(folder, name)
            yield part
            os.replace(part, target)
    except OSError as error:
        sys.exit(f"can't write {path} ({error.strerror or error}): see to its folder and the disk, or name another")


def import_tensorflow():
    """Import TensorFlow without the lines that its C++ writes to stderr before it reads any variable.

    Another process drops them: all else gets through, even the last words of an import that aborts this one.
    """
    stderr = os.dup(2)
    chatter = "^(I0000 |WARNING: All log messages before absl|To enable the following instructions:)"
    grep = subprocess.Popen(["grep", "-Ev", chatter], stdin=subprocess.PIPE, stdout=stderr)
    os.dup2(grep.stdin.fileno(), 2)
    import tensorflow  # noqa: F401

    os.dup2(stderr, 2)
    grep.communicate()


def main():
    """Check all that can be checked, see to the data, train, and leave both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="/tmp/model.keras", help="where to save the model (%(default)s)")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="used if it exists, else written (%(default)s)")
    parser.add_argument("--stand-in", action="store_true", help="draw a stand-in for MNIST, without trying the network")
    arguments = parser.parse_args()
    filename, data = arguments.model, arguments.data
    if not filename.endswith(".keras"):
        parser.error(f"--model {filename}: Keras saves only to a name that ends in .keras, like /tmp/model.keras")
    for path in (filename, data):
        if os.path.exists(path) and not os.path.isfile(path):
            sys.exit(f"{path} is a folder or a device, not a file: name another")
    # sys.exit() unwinds: there is no traceback, and nothing half written stays.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with whole(filename, "model.keras") as new_filename:
        if not os.path.exists(data):
            with whole(data, "mnist.npz") as new_data:
                if arguments.stand_in or not download(new_data):
                    draw_stand_in(new_data)
        mnist, kind = read(data), data_kind(data)
        if arguments.stand_in and kind != "stand-in":
            parser.error(f"--stand-in, but {data} holds other data ({kind}): drop the flag, or name another --data")
        if kind == "stand-in":
            print(f"WARNING: {data} IS A STAND-IN, NOT MNIST. To try for MNIST: remove it, run again.", file=sys.stderr)
        import_tensorflow()
        # Keras draws its progress bar on stdout, and hundreds of times into a file.
        with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")):
            model = train(mnist, new_filename)
        loss, accuracy = model.evaluate(mnist["x_test"] / 255.0, mnist["y_test"], verbose=0)
    print(f"test accuracy {accuracy:.4f} on 10000 images, trained on 60000, data: {kind} ({data}), model: {filename}")


if __name__ == "__main__":
    sys.exit(main())

# For those who paste the snippet; here, main() has just exited.
# snippet: start
if __name__ == "__main__":
    train(np.load("/tmp/mnist.npz"), "/tmp/model.keras")
# snippet: end
