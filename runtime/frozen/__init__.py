"""Warm workers frozen into images, and what an image must show before it is used."""
