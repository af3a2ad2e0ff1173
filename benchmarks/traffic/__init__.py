"""Requests as they arrive over time: from a trace or by chance, live and simulated."""
