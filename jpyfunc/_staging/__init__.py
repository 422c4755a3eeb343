"""Run bodies on abstract values: infer their results, and stage their paths out."""
