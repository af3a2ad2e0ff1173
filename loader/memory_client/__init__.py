"""A worker's side of the memory service."""
