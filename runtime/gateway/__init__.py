"""The HTTP side: a process that owns the listener and holds requests while the replica is cold."""
