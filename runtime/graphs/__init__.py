"""Captured decode steps, kept from one start to the next."""
