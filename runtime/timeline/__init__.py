"""What happened in a start, from all processes: the critical path, and its pictures."""
