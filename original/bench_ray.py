"""Time ten rounds of batch prediction by Ray actors, on the stack of 2019.

The article's program, with a clock, and with files in place of the download. Each actor loads the
model and the data once, in its constructor.

    python bench_ray.py

Ray 0.6.6 listens on all interfaces. Its Redis gets a password here, and `make original` keeps it
in a network namespace, where the system has them.
"""

import record  # First: set-up is timed from here.

import psutil
import ray
import secrets
import signal
import sys
import tensorflow as tf
import time

arguments = record.parse_arguments()

num_cpus = psutil.cpu_count(logical=False)
if num_cpus is None:  # Some virtual machines do not tell.
    num_cpus = psutil.cpu_count()

# Ray ends its processes when Python exits; SIGTERM would end this one alone, and leave the others.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

ray.init(num_cpus=num_cpus, redis_password=secrets.token_hex(16))

filename = arguments.model
datafile = arguments.data


@ray.remote
class Model(object):
    def __init__(self, i):
        # On Linux, pin the actor to a core: TensorFlow's threads would compete for all of them.
        if sys.platform == "linux":
            psutil.Process().cpu_affinity([i])
        self.model = tf.keras.models.load_model(filename)
        mnist = record.load_data(datafile)
        self.x_test = mnist[1][0] / 255.0

    def evaluate_next_batch(self):
        # The same images in every round; an application would have new ones.
        return self.model.predict(self.x_test)


actors = [Model.remote(i) for i in range(num_cpus)]

# Not timed: starting, loading, and the first call.
ray.get([actor.evaluate_next_batch.remote() for actor in actors])
setup_seconds = time.perf_counter() - record.STARTED

round_seconds = []
answers = []
for _ in range(arguments.rounds):
    start = time.perf_counter()
    results = ray.get([actor.evaluate_next_batch.remote() for actor in actors])
    round_seconds.append(time.perf_counter() - start)
    answers += [result.argmax(axis=1).astype("uint8") for result in results]
    print(f"round {len(round_seconds)}: {round_seconds[-1]:.3f} s", flush=True)

record.record(arguments, "ray", setup_seconds, round_seconds, answers, nodes=1, cluster=False)
