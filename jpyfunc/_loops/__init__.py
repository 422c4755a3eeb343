"""A while loop that is differentiable in both modes."""
