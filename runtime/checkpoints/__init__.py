"""Checkpoints that we write: packed anew for their load, or made up for a demo."""
