"""One replica: its processes, who has which request, and what becomes of both."""
