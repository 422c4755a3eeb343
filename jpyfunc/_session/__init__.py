"""TensorFlow 1's graphs and sessions as a facade over `jax.jit`.

A graph is a record of calls; a session lowers what it is asked for to one function of
the fed values, compiles that with `jax.jit`, and keeps it. Nothing here computes.
"""
