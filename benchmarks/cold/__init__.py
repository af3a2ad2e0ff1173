"""`bench cold`: real cold starts over a matrix of tier, cache, source and engine,."""
