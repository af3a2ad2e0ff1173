"""The replica: engine, workers, hand-off, supervision and the command line."""
