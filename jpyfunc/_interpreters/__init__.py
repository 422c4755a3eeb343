"""Ways to run a function on values, each a trace of JAX with its tracer."""
