"""What a body is: the function, the bodies derived from it, and what it returns."""
