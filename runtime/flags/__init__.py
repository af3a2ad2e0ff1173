"""Command-line flags and their twins in the environment, by what they are about."""
