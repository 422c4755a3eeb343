"""Other ways to run a body than a plain call, each a trace of JAX."""
