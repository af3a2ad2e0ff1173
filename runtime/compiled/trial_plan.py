"""What compiled decode steps are tried with: how many layers and keys, how often, and the memory.

Nothing here needs torch: whoever has them compiled asks first whether there is room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS

__all__ = [
    "GAIN",
    "blocks_of",
    "compile_bytes",
    "keys_worth",
    "more_pairs",
    "trial_keys",
    "trial_spec",
]

GAIN = 1.03
"""How many times as fast as eager a step must be to be used, in every case that is measured."""

_BYTES = 128 << 20
"""Of the weights that are measured with: more than a processor's caches hold."""
_KEYS = {96: (15, 60), 1024: (15, 60), 16384: (5, 15)}
"""How many keys a step looks at, and how often that is measured: as a rule, and at most."""
_PROGRAMS_BYTES = 1 << 30
"""What torch with its compiler takes, and the one for C++."""


def trial_spec(spec: ModelSpec) -> ModelSpec:
    """The first layers of a model, which are measured for all."""
    nbytes = spec.dtype_bytes * sum(map(prod, spec.layer_tensors(0).values()))
    count = min(spec.layers, 1 + _BYTES // nbytes)
    return replace(spec, layers=count, windows=spec.windows[:count])


def trial_keys(spec: ModelSpec) -> dict[int, tuple[int, int]]:
    """How many keys steps look at, ascending, each with its least and most pairs."""
    return {max(2, min(keys, spec.context_length)): pairs for keys, pairs in _KEYS.items()}


def blocks_of(spec: ModelSpec) -> int:
    """KV blocks of each sequence that is tried."""
    return -(-max(trial_keys(spec)) // BLOCK_TOKENS)


def compile_bytes(spec: ModelSpec, sequences: int) -> int:
    """The memory that compiling and trying takes.

    Args:
        spec: The model's shape.
        sequences: In the largest step.
    """
    tried = trial_spec(spec)
    weights = tried.dtype_bytes * sum(map(prod, tried.expected_tensors().values()))
    kv = sequences * blocks_of(spec) * tried.kv_block_bytes(tried.dtype_bytes, BLOCK_TOKENS)
    return _PROGRAMS_BYTES + weights + kv


def more_pairs(ratios: Sequence[float], least: int, most: int) -> bool:
    """Whether so many measurements leave it open on which side of the threshold it is."""
    if len(ratios) < least or len(ratios) < 2:
        return True
    if len(ratios) >= most:
        return False
    from statistics import quantiles  # what asks for the memory alone does without it

    low, _, high = quantiles(ratios, n=4)
    return low < GAIN <= high


def keys_worth(ratios: Mapping[int, Sequence[Sequence[float]]]) -> tuple[int, float]:
    """Up to how many keys steps are faster than eager, by more than a measurement may err.

    Args:
        ratios: By keys, ascending: of each case, how many times as fast a step was each time.

    Returns:
        The most keys up to which all are, 0 where none is; and how many times as fast a step is
        in the least favourable of those cases, or of the first where none is.
    """
    from statistics import median

    keys, speedup = 0, 0.0
    for count, cases in ratios.items():
        least = min(map(median, cases))
        if least < GAIN:
            return keys, speedup or least
        keys, speedup = count, min(speedup or least, least)
    return keys, speedup
