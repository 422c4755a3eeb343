"""Bodies on abstract values: what they return, and what of them is compiled."""
