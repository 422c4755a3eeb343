"""Bodies, and the computation of each kind."""
