"""What a body is, and how each kind of it is computed."""
