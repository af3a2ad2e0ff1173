"""Weights from a checkpoint to device memory, in the order of use. Never imports torch."""
