"""A checkpoint read strictly: what is in it, which bytes go where, and what seals it."""
