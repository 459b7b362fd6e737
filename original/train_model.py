"""Train the article's classifier with the TensorFlow of 2019, for the benchmarks beside this.

The article's program, with files in place of the download. The data are a mnist.npz that the
train_model.py of the folder above has left.

    python train_model.py
"""

import argparse

import record
import tensorflow as tf

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=record.MODEL, help="default: %(default)s")
parser.add_argument("--data", default="/tmp/mnist.npz", help="default: %(default)s")
arguments = parser.parse_args()

mnist = record.load_data(arguments.data)
x_train, y_train = mnist[0]
x_train = x_train / 255.0
model = tf.keras.models.Sequential(
    [
        tf.keras.layers.Flatten(input_shape=(28, 28)),
        tf.keras.layers.Dense(512, activation=tf.nn.relu),
        tf.keras.layers.Dropout(0.2),
        tf.keras.layers.Dense(10, activation=tf.nn.softmax),
    ]
)
model.compile(
    optimizer="adam",
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
# Train the model. A progress bar would fill the log.
model.fit(x_train, y_train, epochs=1, verbose=0)
# Save the model to disk.
filename = arguments.model
model.save(filename)
