"""These tests need vLLM: `make test-vllm` runs them in its environment."""

from __future__ import annotations

from importlib.util import find_spec

# Elsewhere only those that need none of it, and which say so by their name.
collect_ignore_glob = [] if find_spec("vllm") is not None else ["test_real_*.py"]
