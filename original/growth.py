"""Show what the article's stateless call leaves behind, under any TensorFlow from 1.13 on: it is made again and again.

One process, pinned to one core, loads the model and the data and predicts, like the pool's function. After each call it
writes a line of JSON: the seconds of load_model, of predict and of the whole call; the operations in the graph in which
Keras builds models (null from TensorFlow 2.4 on, where there is none); resident memory, in bytes; the number of Python
objects, garbage that waits for its collection included.

    python growth.py --model model.h5 --data /tmp/mnist.npz
    python growth.py --clear-session ...      # clear_session() before each load_model
    python growth.py --collect ...            # after each call and its clock, collect garbage before the count
    python growth.py --profile 2,20,40 ...    # where these calls spend their time, by cProfile

--profile adds [calls, seconds] of the session's C functions in load_model and in predict. ExtendSession and
TF_SessionRun_wrapper (Session.run) prepare a graph that has changed; TF_SessionRunCallable is one of the 313 steps.
"""

import argparse
import cProfile
import gc
import json
import os
import pstats
import sys
import time

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
import numpy as np
import psutil
import tensorflow as tf

PROFILED = ["ExtendSession", "TF_SessionRun_wrapper", "TF_SessionMakeCallable", "TF_SessionRunCallable"]


def count_operations():
    """Return the number of operations in the graph in which Keras builds its models; None if there is no such graph."""
    version = tuple(map(int, tf.__version__.split(".")[:2]))
    if version < (2, 0):
        return len(tf.get_default_graph().get_operations())
    if version < (2, 4):
        from tensorflow.python.keras import backend

        return len(backend.get_graph().get_operations())
    return None  # Keras builds its models of KerasTensors, without a graph.


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
        sys.exit("growth.py: wrong answers by {}: train it anew".format(arguments.model))
    measured = {"seconds": seconds, "load_seconds": load_seconds, "predict_seconds": predict_seconds}
    if profile:
        measured.update(profile={"load_model": in_load, "predict": in_predict})
    return measured


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--clear-session", action="store_true", help="call clear_session() before each load_model")
    parser.add_argument("--collect", action="store_true", help="collect garbage before objects are counted")
    parser.add_argument("--profile", default="", metavar="2,20,40", help="numbers of the calls to profile")
    # In the folder of this file, whatever the current one is: Keras of 2019 runs code that a model's file contains.
    model = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.h5")
    parser.add_argument("--model", default=model, help="default: %(default)s")
    parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
    parser.add_argument("--output", default="growth.jsonl", type=argparse.FileType("a"), help="default: %(default)s")
    arguments = parser.parse_args()
    profiled = {int(number) for number in arguments.profile.split(",") if number}
    process = psutil.Process()
    if sys.platform == "linux":
        process.cpu_affinity(process.cpu_affinity()[:1])
    if hasattr(tf, "logging"):
        tf.logging.set_verbosity(tf.logging.ERROR)
    else:
        tf.get_logger().setLevel("ERROR")
    run = time.time()
    shared = {"run": run, "tensorflow": tf.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
    shared.update(clear_session=arguments.clear_session, collect=arguments.collect)
    for number in range(1, arguments.calls + 1):
        measured = call(arguments, number in profiled)
        if arguments.collect:
            gc.collect()
        measured.update(call=number, operations=count_operations(), resident_bytes=process.memory_info().rss)
        measured.update(objects=len(gc.get_objects()))
        print(json.dumps(dict(shared, **measured)), file=arguments.output, flush=True)
        print(
            "call {call}: {seconds:.2f} s, operations: {operations}, objects: {objects}".format(**measured), flush=True
        )


if __name__ == "__main__":
    main()
