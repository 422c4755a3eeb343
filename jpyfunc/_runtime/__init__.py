"""What surrounds a run: programs in flight, and how exceptions leave them."""
