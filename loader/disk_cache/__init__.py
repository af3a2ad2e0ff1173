"""A cache on disk of checkpoints that came over a network."""
