"""Processes frozen warm and brought back as clones."""
