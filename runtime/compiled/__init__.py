"""Decode steps as compiled code: made before an image is, tried, and taken up by clones."""
