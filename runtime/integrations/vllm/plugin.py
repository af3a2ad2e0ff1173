"""What vLLM calls in each of its processes, before it looks for loaders and connectors."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Makes this package known to vLLM. To be called as often as one likes."""
