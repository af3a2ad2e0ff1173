"""`coldframe bench batching MODEL`: how large a batch of prompts should be.

Prompts of all lengths that come at the same moment, through the prefill's own scheduler in one
process. It puts prompts together up to a number of tokens: the one that was measured to saturate
the device, as a worker measures it; 1, so that each goes alone; and 2048, so that nearly all go
together. What counts is the mean time to their first tokens. Runs are interleaved, each with
prompts of its own.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows
from coldframe.benchmarks.in_process import load_model, sequence_of
from coldframe.benchmarks.pacing import prompt_ids
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.replica.loads import blocks_of

__all__ = ["add_arguments", "burst_lengths", "run"]

_ALONE, _TOGETHER = 1, 2048
_SHORTEST, _LONGEST = 8, 1000
_NOISE = 1.03


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=5, help="bursts of each kind (5)")
    parser.flag("--prompts", type=int, default=16, help="prompts in a burst (16)")
    parser.flag("--sizes", default="", help="more bounds to try, as 64,128,512")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether the target is met.

    Raises:
        RequestError: A size is none.
    """
    more = [_size(text) for text in args.sizes.split(",") if text]
    os.environ["OMP_NUM_THREADS"] = str(cpu_count())
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as workers have it
    burst = _Burst(str(args.model), args.prompts)
    measured = burst.measure()
    print(f"saturated by {measured} tokens", file=sys.stderr)
    sizes = list(dict.fromkeys([measured, _ALONE, _TOGETHER, *more]))
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(-1, args.runs):
        print(f"run {number + 1} of {args.runs}", file=sys.stderr)
        for size in sizes:
            seconds = burst.mean_ttft_s(size, number)
            if number >= 0:  # before that kernels are made
                found[size].append(seconds)
    rows = [Row(f"mean TTFT, up to {size} tokens together", found[size], "s") for size in sizes]
    for size in (_ALONE, _TOGETHER):
        ratios = [a / b for a, b in zip(found[measured], found[size], strict=True)]
        rows.append(Row(f"{measured} / {size}", ratios, "ratio", _NOISE))
    facts = {"model": str(args.model), "prompts": args.prompts, "measured": measured}
    print_rows(rows, facts)
    return 0 if all(row.met is not False for row in rows) else 1


def _size(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise RequestError("this is no number of tokens", where="--sizes", got=repr(text))
    return int(text)


def burst_lengths(prompts: int, number: int, longest: int = _LONGEST) -> list[int]:
    """How long the prompts of a burst are: as many of each order of magnitude."""
    draw = random.Random(number)
    ratio = longest / _SHORTEST
    return [round(_SHORTEST * ratio ** draw.random()) for _ in range(prompts)]


class _Burst:
    """A model, and bursts of prompts for it."""

    def __init__(self, directory: str, prompts: int) -> None:
        from coldframe.runtime.worker.text import Tokenizer

        self._prompts = prompts
        self._model = load_model(directory, prompts * blocks_of(_LONGEST + 1))
        self._tokenizer = Tokenizer.load(directory)

    def measure(self) -> int:
        """The size that a worker finds, with these weights."""
        from coldframe.runtime.engine.saturation import SaturationProbe

        probe = SaturationProbe()
        while (found := probe.advance(self._model.weights.layers)) is None:
            pass
        return found.tokens

    def mean_ttft_s(self, size: int, number: int) -> float:
        """Seconds, of one burst, with prompts put together up to so many tokens."""
        from coldframe.runtime.engine.prefill import Prefiller

        spec = self._model.spec
        prefiller = Prefiller(self._model, lambda stage: True)
        prefiller.full = size
        lengths = burst_lengths(self._prompts, number, min(_LONGEST, spec.context_length - 1))
        ends = list(accumulate(blocks_of(length + 1) for length in lengths))
        for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            prompt = prompt_ids(length, 1000 * number + index, spec.vocab_size)
            blocks = list(range(end - blocks_of(length + 1), end))
            prefiller.admit(
                sequence_of(str(index), prompt, 2, blocks, self._tokenizer, spec.eos_token_ids)
            )
        started = time.monotonic()
        waited: list[float] = []
        while not prefiller.idle:
            first = prefiller.advance() or []
            waited += [time.monotonic() - started] * len(first)
        return statistics.mean(waited)
