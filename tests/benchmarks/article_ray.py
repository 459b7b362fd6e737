"""The article's Ray script as it stands, mended so that it runs at all: what bench_ray.py has to beat.

Changed: file names with an extension, the data from a file, no progress bars, `ray.init` beside a running cluster.
It prints the seconds from its start until the actors have answered once, and the seconds of each round (JSON).
"""

import time

STARTED = time.perf_counter()

import json
import sys

import numpy as np
import psutil
import ray
import tensorflow as tf

filename, datafile, num_cpus = sys.argv[1], sys.argv[2], int(sys.argv[3])

ray.init("local", num_cpus=num_cpus)


@ray.remote
class Model(object):
    def __init__(self, i):
        if sys.platform == "linux":
            psutil.Process().cpu_affinity([i])
        self.model = tf.keras.models.load_model(filename)
        with np.load(datafile) as mnist:
            arrays = [mnist[name] for name in ("x_train", "y_train", "x_test", "y_test")]
        self.x_test = arrays[2] / 255.0

    def evaluate_next_batch(self):
        return self.model.predict(self.x_test, verbose=0)


actors = [Model.remote(i) for i in range(num_cpus)]
ray.get([actor.evaluate_next_batch.remote() for actor in actors])
setup_seconds = time.perf_counter() - STARTED

round_seconds = []
for _ in range(10):
    start = time.perf_counter()
    results = ray.get([actor.evaluate_next_batch.remote() for actor in actors])
    round_seconds.append(time.perf_counter() - start)
print(json.dumps({"setup_seconds": setup_seconds, "round_seconds": round_seconds}))
