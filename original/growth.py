"""Show what the article's stateless call leaves behind, under any TensorFlow from 1.13 on: it is made again and again.

One process, pinned to one core, loads the model and the data and predicts, like the pool's function. After each call it
writes a line of JSON: the seconds of load_model, of predict and of the whole call; the operations in the graph that the
model is built in (null from TensorFlow 2.4 on, where there is none); resident memory, in bytes; the number of Python
objects, garbage that waits for its collection included.

    python growth.py --model model.h5 ...     # Keras 3 cannot load this one: give it train_model.py's model.keras
    python growth.py --clear-session ...      # clear_session() before each load_model
    python growth.py --collect ...            # after each call and its clock, collect garbage before the count
    python growth.py --profile 2,20,40 ...    # where these calls spend their time, by cProfile

--profile adds [calls, seconds] of the session's C functions in load_model and in predict. ExtendSession and
TF_SessionRun_wrapper (Session.run) prepare a graph that has changed; TF_SessionRunCallable is one of the 313 steps.
TensorFlow 2 calls none of them. other_seconds is what is left of load_model, of predict and, as data, of the call.
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

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
os.environ.pop("TF2_BEHAVIOR", None)  # Each version behaves as it does by default.
os.environ.pop("TF_USE_LEGACY_KERAS", None)
import numpy as np
import psutil
import tensorflow as tf

# In the project's folder, wherever this is called from: Keras runs code that a model's HDF5 file contains.
MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.h5")
PROFILED = ["ExtendSession", "TF_SessionRun_wrapper", "TF_SessionMakeCallable", "TF_SessionRunCallable"]


def count_operations(model):
    """Return the number of operations in the graph that the model is built in; None if there is no such graph."""
    graph = getattr(model.outputs[0], "graph", None)  # A KerasTensor has none.
    if graph is None:
        return None
    return len(graph.get_operations())


def timed(function, profile):
    """Call the function; return its result, its seconds, and [calls, seconds] of PROFILED functions, if profile."""
    profiler = cProfile.Profile()
    start = time.perf_counter()
    if profile:
        result = profiler.runcall(function)
    else:
        result = function()
    seconds = time.perf_counter() - start
    found = {}
    if profile:
        for (_, _, function_name), (_, calls, own_seconds, _, _) in pstats.Stats(profiler).stats.items():
            for name in PROFILED:
                if function_name.rstrip(">}").endswith(name):
                    found[name] = [calls, own_seconds]
    return result, seconds, found


def call(arguments, profile):
    """Make the article's stateless call; return what was measured."""
    start = time.perf_counter()
    if arguments.clear_session:
        tf.keras.backend.clear_session()
    model, load_seconds, in_load = timed(lambda: tf.keras.models.load_model(arguments.model), profile)
    with np.load(arguments.data) as file:
        mnist = (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])
    x_test = mnist[1][0] / 255.0
    answers, predict_seconds, in_predict = timed(lambda: model.predict(x_test, verbose=0), profile)
    seconds = time.perf_counter() - start
    if np.mean(answers.argmax(axis=1) == mnist[1][1]) < 0.9:
        raise ValueError("wrong answers")
    measured = {"seconds": seconds, "load_seconds": load_seconds, "predict_seconds": predict_seconds}
    measured.update(operations=count_operations(model))
    if profile:
        other = {"load_model": load_seconds, "predict": predict_seconds}
        for part, found in (("load_model", in_load), ("predict", in_predict)):
            other[part] -= sum(own_seconds for _, own_seconds in found.values())
        other["data"] = seconds - load_seconds - predict_seconds
        measured.update(profile={"load_model": in_load, "predict": in_predict}, other_seconds=other)
    return measured


def call_numbers(text):
    """Read the numbers of calls, as in 2,20,40."""
    return {int(number) for number in text.split(",")}


def machine():
    """Return the processor, its physical cores and the system, as the records of the benchmarks name them."""
    processor = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = file.read().partition("model name\t: ")[2].partition("\n")[0]
    return "{}, {} physical cores, {}".format(processor, psutil.cpu_count(logical=False), platform.system())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--clear-session", action="store_true", help="call clear_session() before each load_model")
    parser.add_argument("--collect", action="store_true", help="collect garbage before objects are counted")
    parser.add_argument("--profile", type=call_numbers, default=set(), metavar="2,20,40", help="calls to profile")
    parser.add_argument("--model", default=MODEL, help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument("--output", default="growth.jsonl", type=argparse.FileType("a"), help="default: %(default)s")
    arguments = parser.parse_args()
    process = psutil.Process()
    if sys.platform == "linux":
        process.cpu_affinity(process.cpu_affinity()[:1])
    if hasattr(tf, "logging"):
        tf.logging.set_verbosity(tf.logging.ERROR)
    else:
        tf.get_logger().setLevel("ERROR")
    run = time.time()
    shared = {"run": run, "tensorflow": tf.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    shared.update(keras=tf.keras.__version__, machine=machine())
    shared.update(clear_session=arguments.clear_session, collect=arguments.collect)
    for number in range(1, arguments.calls + 1):
        try:
            measured = call(arguments, number in arguments.profile)
        except Exception as error:  # At a foreign file, each version raises something else.
            reason = "{}: {}".format(type(error).__name__, str(error).strip().split("\n")[-1])
            message = "growth.py: TensorFlow {} cannot use {} or {} ({}): name others by --model and --data"
            sys.exit(message.format(tf.__version__, arguments.model, arguments.data, reason))
        if arguments.collect:
            gc.collect()
        measured.update(call=number, time=time.time(), resident_bytes=process.memory_info().rss)
        measured.update(objects=len(gc.get_objects()))
        print(json.dumps(dict(shared, **measured)), file=arguments.output, flush=True)
        counted = "operations: {operations}"
        if measured["operations"] is None:
            counted = "operations: none to count"
        told = "call {call}: {seconds:.2f} s, " + counted + ", objects: {objects}"
        print(told.format(**measured), flush=True)


if __name__ == "__main__":
    main()
