"""Times of `tf.py_function` as JSON, for run.py; needs tensorflow and nothing else."""

import json
import statistics
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


def median_us(function, *args):
    for _ in range(20):
        function(*args)
    times = []
    for _ in range(21):
        start = time.perf_counter()
        for _ in range(30):
            function(*args)
        times.append((time.perf_counter() - start) / 30 * 1e6)
    return statistics.median(times)


x, m = tf.constant(3.0), tf.constant(2.0)
print(
    json.dumps({
        "version": tf.__version__,
        "log_huber, forward": median_us(forward, x, m),
        "log_huber, value_and_grad": median_us(value_and_grad, x, m),
    })
)  # fmt: skip
