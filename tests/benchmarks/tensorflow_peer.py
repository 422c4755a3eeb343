"""Times `tf.py_function` for run.py; needs tensorflow and nothing else.

It prints the version of TensorFlow, then, for each line with the name of a work, how many
microseconds a call of it takes.
"""

import sys
import time

import tensorflow as tf


def log_huber(x, m):
    if tf.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * tf.math.log(m) + tf.math.log(x**2))


@tf.function
def forward(x, m):
    return tf.py_function(log_huber, [x, m], tf.float32)


@tf.function
def value_and_grad(x, m):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.py_function(log_huber, [x, m], tf.float32)
    return y, tape.gradient(y, x)


WORK = {"log_huber, forward": forward, "log_huber, value_and_grad": value_and_grad}
x, m = tf.constant(3.0), tf.constant(2.0)
for function in WORK.values():
    for _ in range(20):
        function(x, m)
print(tf.__version__, flush=True)
for line in sys.stdin:
    function = WORK[line.strip()]
    start = time.perf_counter()
    for _ in range(30):
        function(x, m)
    print((time.perf_counter() - start) / 30 * 1e6, flush=True)
