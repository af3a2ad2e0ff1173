"""KV that goes from one replica to another: the memory services' part of it."""
