"""Time rounds of batch prediction in one process, on the stack of 2019: in each round a batch for every physical core.

The article shows no code for this one. TensorFlow itself uses several threads.

    python bench_serial.py --rounds 50
"""

import record  # First: the time of the set-up runs from here.

import psutil
import tensorflow as tf
import time

num_cpus = psutil.cpu_count(logical=False) or psutil.cpu_count()


def main():
    arguments = record.parse_arguments()
    model = tf.keras.models.load_model(arguments.model)
    mnist = record.load_data(arguments.data)
    x_test = mnist[1][0] / 255.0
    model.predict(x_test)
    setup_seconds = time.perf_counter() - record.STARTED

    round_seconds = []
    answers = []
    cpu_seconds = 0
    for _ in range(arguments.rounds):
        cpu_start = time.process_time()
        start = time.perf_counter()
        results = [model.predict(x_test) for _ in range(num_cpus)]
        round_seconds.append(time.perf_counter() - start)
        cpu_seconds += time.process_time() - cpu_start
        answers += [result.argmax(axis=1) for result in results]
        print("round {}: {:.3f} s".format(len(round_seconds), round_seconds[-1]), flush=True)

    record.record(arguments, "serial", num_cpus, setup_seconds, round_seconds, answers, cpu_seconds)


if __name__ == "__main__":
    main()
