"""A checkpoint on its way into an arena, and the weights once they are there."""
