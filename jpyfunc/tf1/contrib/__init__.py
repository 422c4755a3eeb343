"""TensorFlow 1's `tf.contrib`: `eager`."""

from jpyfunc.tf1.contrib import eager as eager
