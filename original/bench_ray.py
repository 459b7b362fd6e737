"""Time the article's actors, on the stack of 2019: each loads the model and the data once, in its constructor.

The article's code, with a clock and with files in place of the download. Before the clock starts, every actor has
answered once. Ray of 2019 listens on all interfaces: here it always has a password, and `make original` keeps it in a
network namespace where the system allows that.

    python bench_ray.py --rounds 50
"""

import record  # First: the time of the set-up runs from here.

import psutil
import ray
import secrets
import sys
import tensorflow as tf
import time

num_cpus = psutil.cpu_count(logical=False) or psutil.cpu_count()


@ray.remote
class Model(object):
    def __init__(self, i, filename, datafile):
        # On Linux each actor keeps to one core: otherwise the threads of all their TensorFlows compete.
        if sys.platform == "linux":
            psutil.Process().cpu_affinity([i])
        self.model = tf.keras.models.load_model(filename)
        mnist = record.load_data(datafile)
        self.x_test = mnist[1][0] / 255.0

    def evaluate_next_batch(self):
        # The same images in every round; an application would have new ones.
        return self.model.predict(self.x_test)


def main():
    arguments = record.parse_arguments()
    ray.init(num_cpus=num_cpus, redis_password=secrets.token_hex(16))
    actors = [Model.remote(i, arguments.model, arguments.data) for i in range(num_cpus)]
    ray.get([actor.evaluate_next_batch.remote() for actor in actors])
    setup_seconds = time.perf_counter() - record.STARTED

    round_seconds = []
    answers = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        results = ray.get([actor.evaluate_next_batch.remote() for actor in actors])
        round_seconds.append(time.perf_counter() - start)
        answers += [result.argmax(axis=1) for result in results]
        print("round {}: {:.3f} s".format(len(round_seconds), round_seconds[-1]), flush=True)

    record.record(arguments, "ray", num_cpus, setup_seconds, round_seconds, answers)


if __name__ == "__main__":
    main()
