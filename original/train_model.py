"""Train the article's classifier with the TensorFlow of 2019, and leave the model that the benchmarks beside this read.

The article's code, with files in place of the download: the data is a mnist.npz that the project's train_model.py has
left, the model an HDF5 file as the article's is.

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
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, epochs=1, verbose=0)
filename = arguments.model
model.save(filename)
