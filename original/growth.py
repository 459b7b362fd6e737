"""Make the article's stateless call again and again, and record what each call takes and leaves.

One process, pinned to one core, does what the pool's function does: it loads the model, reads the
data and predicts. Runs under every TensorFlow from 1.13 to 2.21; of the flags, --profile,
--fresh-session and those with a graph ask for TensorFlow 1, --without-autotuner for one of today.

    python growth.py
    python growth.py --clear-session      # a new graph and a new session in every call
    python growth.py --fresh-session      # a new session in every call, the old graph
    python growth.py --collect            # collect garbage after each call, before the count
    python growth.py --without-autotuner  # predict from a Dataset without tf.data's autotuner
    python growth.py --parts              # predict once more with the same model, not traced anew
    python growth.py --profile 2,20,40    # where these calls spend their time, by cProfile
    python growth.py --save-graph F       # at the end, write the graph to the file F
    python growth.py --import-graph F     # begin with this graph in the default graph
    python growth.py --import-apart F     # begin with this graph in another one, for comparison

Every call is a line of JSON in growth.jsonl. Keras 3 cannot load the model of 2019: under a
TensorFlow of today, name the model.keras of the folder above with --model.
"""

import argparse
import cProfile
import gc
import json
import os
import platform
import pstats
import sys
import time
import zipfile

# Before TensorFlow is imported, whatever the user exports: no GPU, errors only, its own defaults.
os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
os.environ.pop("TF2_BEHAVIOR", None)
os.environ.pop("TF_USE_LEGACY_KERAS", None)
import numpy as np
import psutil
import tensorflow as tf
from machine import machine

# In this folder, not in /tmp: Keras of 2019 runs code that a model's file contains.
MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.h5")
STARTED = time.time()

# The C functions in which TensorFlow 1 spends a call's time. The first two prepare a graph that
# has changed, as does the third for the steps of predict; the last one makes one such step.
PROFILED = [
    "ExtendSession",
    "TF_SessionRun_wrapper",
    "TF_SessionMakeCallable",
    "TF_SessionRunCallable",
]


def main():
    arguments = parse_arguments()
    silence_and_pin()
    other_graph = tf.Graph()
    if arguments.import_graph:
        import_graph(arguments.import_graph, tf.get_default_graph())
    if arguments.import_apart:
        import_graph(arguments.import_apart, other_graph)
    for number in range(1, arguments.calls + 1):
        measured = call(arguments, profile=number in arguments.profile)
        if arguments.collect:
            gc.collect()
        line = {
            "run": STARTED,
            "call": number,
            "time": time.time(),
            "tensorflow": tf.__version__,
            "keras": tf.keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": machine(),
            "clear_session": arguments.clear_session,
            "fresh_session": arguments.fresh_session,
            "without_autotuner": arguments.without_autotuner,
            "collect": arguments.collect,
            "import_graph": bool(arguments.import_graph),
            "import_apart": bool(arguments.import_apart),
            **measured,
            "objects": len(gc.get_objects()),  # Garbage that waits for its collection included.
            "resident_bytes": psutil.Process().memory_info().rss,
        }
        print(json.dumps(line), file=arguments.output, flush=True)
        print(
            f"call {number}: {measured['seconds']:.2f} s, operations: {measured['operations']}, "
            f"objects: {line['objects']}",
            flush=True,
        )
    if arguments.save_graph:
        arguments.save_graph.write(tf.get_default_graph().as_graph_def().SerializeToString())


def import_graph(file, graph):
    """Add the operations in a file of --save-graph to a graph. No call will use them."""
    graph_def = tf.GraphDef()
    graph_def.ParseFromString(file.read())
    with graph.as_default():
        tf.import_graph_def(graph_def, name="earlier")


def call(arguments, profile):
    """Make the article's stateless call, and return what was measured.

    All seconds but predict_again_seconds are parts of the call's. What is left of those went into
    the division by 255, the Dataset, and the session or graph that a flag asked for.
    """
    start = time.perf_counter()
    if arguments.clear_session:
        tf.keras.backend.clear_session()
    if arguments.fresh_session:
        tf.keras.backend.set_session(None)  # Keras makes a new one, for the graph that is there.
    model, load = timed(lambda: tf.keras.models.load_model(arguments.model), profile)
    mnist, read_seconds = read(arguments.data)
    x_test = mnist["x_test"] / 255.0
    if arguments.without_autotuner:
        x_test = without_autotuner(x_test)
    answers, predict = timed(lambda: model.predict(x_test, verbose=0), profile)
    seconds = time.perf_counter() - start

    accuracy = np.mean(answers.argmax(axis=1) == mnist["y_test"])
    if accuracy < 0.9:
        sys.exit(f"growth.py: {accuracy:.1%} of the answers are right, fewer than 90%")
    predict_again_seconds = None
    if arguments.parts:
        _, again = timed(lambda: model.predict(x_test, verbose=0), profile=False)
        predict_again_seconds = again["seconds"]
    return {
        "seconds": seconds,
        "load_seconds": load["seconds"],
        "read_seconds": read_seconds,
        "predict_seconds": predict["seconds"],
        "predict_again_seconds": predict_again_seconds,
        "operations": count_operations(model),
        "profile": {"load_model": load["found"], "predict": predict["found"]} if profile else None,
    }


def timed(function, profile):
    """Call the function. Return its result, and its seconds and what cProfile found, if asked.

    That is {name: [calls, seconds]} of the functions in PROFILED.
    """
    profiler = cProfile.Profile()
    start = time.perf_counter()
    if profile:
        result = profiler.runcall(function)
    else:
        result = function()
    seconds = time.perf_counter() - start
    found = {}
    if profile:
        for (_, _, function_name), statistics in pstats.Stats(profiler).stats.items():
            _, calls, own_seconds, _, _ = statistics
            for name in PROFILED:
                if function_name.rstrip(">}").endswith(name):
                    found[name] = [calls, own_seconds]
    return result, {"seconds": seconds, "found": found}


def read(datafile):
    """Read all four arrays, as mnist.load_data() does. Return them and the seconds of each."""
    mnist = {}
    seconds = {}
    with np.load(datafile) as file:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            start = time.perf_counter()
            mnist[name] = file[name]
            seconds[name] = time.perf_counter() - start
    return mnist, seconds


def without_autotuner(x_test):
    """Return the batches that model.predict() makes of an array, as a Dataset.

    With an array comes an autotuner. On a pinned core a call can wait for it at its end, for as
    long as the call itself has taken. For a Dataset it can be switched off.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    images = tf.data.Dataset.from_tensor_slices(tf.constant(x_test, "float32"))
    return images.batch(32).with_options(options)


def count_operations(model):
    """Return the number of operations in the graph of the model; None if it is in no graph."""
    graph = getattr(model.outputs[0], "graph", None)  # From TensorFlow 2.4 on there is none.
    if graph is None:
        return None
    return len(graph.get_operations())


def silence_and_pin():
    """Silence warnings of what is deprecated, and keep to the first core that we may use."""
    if hasattr(tf, "logging"):
        tf.logging.set_verbosity(tf.logging.ERROR)
    else:
        tf.get_logger().setLevel("ERROR")
    if sys.platform == "linux":
        process = psutil.Process()
        process.cpu_affinity(process.cpu_affinity()[:1])


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=50, help="default: %(default)s")
    flags = parser.add_mutually_exclusive_group()
    flags.add_argument(
        "--clear-session", action="store_true", help="a new graph and session in every call"
    )
    flags.add_argument("--fresh-session", action="store_true", help="a new session in every call")
    parser.add_argument("--collect", action="store_true", help="collect garbage before the count")
    parser.add_argument("--without-autotuner", action="store_true", help="predict from a Dataset")
    parser.add_argument("--parts", action="store_true", help="predict once more with each model")
    parser.add_argument(
        "--profile",
        type=lambda text: {int(number) for number in text.split(",")},
        default=set(),
        metavar="2,20,40",
        help="the calls to profile",
    )
    write, read = argparse.FileType("wb"), argparse.FileType("rb")
    parser.add_argument("--save-graph", type=write, help="write the default graph at the end")
    parser.add_argument("--import-graph", type=read, help="begin with the graph in this file")
    parser.add_argument("--import-apart", type=read, help="begin with it in a graph of its own")
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument(
        "--output",
        default="growth.jsonl",
        type=argparse.FileType("a"),
        help="default: %(default)s",
    )
    arguments = parser.parse_args()
    graphs = arguments.save_graph or arguments.import_graph or arguments.import_apart
    if (arguments.fresh_session or graphs) and not tf.__version__.startswith("1."):
        parser.error(
            "--fresh-session, --save-graph, --import-graph, --import-apart: TensorFlow 2 predicts "
            "without a session"
        )
    if arguments.without_autotuner and not hasattr(tf.data.Options(), "autotune"):
        parser.error(f"--without-autotuner: TensorFlow {tf.__version__} has no such option")
    if not os.path.exists(arguments.model):
        parser.error(f"{arguments.model} is missing: name another with --model")
    if not zipfile.is_zipfile(arguments.data):  # The format .npz is a zip archive.
        parser.error(f"{arguments.data} is missing or damaged: run train_model.py")
    return arguments


if __name__ == "__main__":
    main()
