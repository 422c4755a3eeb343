"""The surroundings of a run: its context, programs in flight, and their exceptions."""
