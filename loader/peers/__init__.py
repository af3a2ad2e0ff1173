"""Weights given to other replicas, and taken from them."""
