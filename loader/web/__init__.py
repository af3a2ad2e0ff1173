"""Weights over a network: one reader of ranges, and one way to address and sign for each store."""
