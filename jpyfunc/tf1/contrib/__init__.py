"""What TensorFlow 1 has under `tf.contrib`: `eager`."""

from jpyfunc.tf1.contrib import eager as eager
