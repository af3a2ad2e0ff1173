"""The process that owns the arenas: its loop, and a desk for each kind of message."""
