"""Show what the article's stateless pool leaves behind: seconds of each round, and operations in each worker's graph.

It runs with every TensorFlow, so that one can see when the growth went away. With Keras 3 there is no such graph.

    python growth.py /tmp/original-model.h5 /tmp/mnist.npz 20    # 20 rounds
"""

import sys
import time
from multiprocessing import Pool

import numpy as np
import psutil
import tensorflow as tf


def evaluate_next_batch(i):
    if sys.platform == "linux":
        psutil.Process().cpu_affinity([i])
    model = tf.keras.models.load_model(sys.argv[1])
    mnist = dict(np.load(sys.argv[2]))
    model.predict(mnist["x_test"] / 255.0)
    try:
        from tensorflow.python.keras import backend
    except ImportError:
        return 0
    return len(backend.get_graph().get_operations())


if __name__ == "__main__":
    num_cpus = psutil.cpu_count(logical=False)
    pool = Pool(num_cpus)
    for _ in range(int(sys.argv[3])):
        start = time.perf_counter()
        operations = pool.map(evaluate_next_batch, range(num_cpus))
        print(f"TensorFlow {tf.__version__}, {time.perf_counter() - start:.2f} s, operations: {operations}", flush=True)
