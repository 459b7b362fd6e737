"""Time rounds of batch prediction in one process, on the stack of 2019: the same batch once for each physical core.

The article shows no code for this one. TensorFlow itself uses several threads.

    python bench_serial.py
"""

import record  # First: the time of the set-up runs from here.

from functools import partial
import psutil
import tensorflow as tf
import time

num_cpus = psutil.cpu_count(logical=False) or psutil.cpu_count()


def serial_rounds(model, x_test, rounds):
    for _ in range(rounds):
        start = time.perf_counter()
        results = [model.predict(x_test) for _ in range(num_cpus)]
        yield time.perf_counter() - start, results


def main():
    arguments = record.parser.parse_args()
    shared = record.announce("serial", num_cpus, arguments)
    model = tf.keras.models.load_model(arguments.model)
    mnist = record.load_data(arguments.data)
    x_test = mnist[1][0] / 255.0
    model.predict(x_test)
    record.run_trials(shared, arguments, partial(serial_rounds, model, x_test, arguments.rounds))


if __name__ == "__main__":
    main()
