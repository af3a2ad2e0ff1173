"""Prefill and decode in one process and one loop, as an engine without separate workers does it.

There is no such worker, so this is for measuring alone: the same engine, weights, threads and text,
and between two decode steps each prompt that has come is computed as a whole. No sockets lie on the
way of a token, which is to this one's advantage. It runs as a process of its own:

    python -m coldframe.benchmarks.together '{"model": ..., ...}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from coldframe.benchmarks.in_process import load_model, sequence_of
from coldframe.benchmarks.pacing import Load, Pace, Phase, prompt_ids
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import PlatformError
from coldframe.runtime.replica.loads import blocks_of
from coldframe.runtime.replica.sizing import ModelFacts

if TYPE_CHECKING:
    from coldframe.runtime.engine.sequence import Sequence

__all__ = ["measure_together"]


def measure_together(
    model: Path, load: Load, seconds: float, interval_s: float, seed: int
) -> tuple[Phase, Phase]:
    """Decodes in one process with the prompts: undisturbed, then while those arrive.

    Args:
        model: A checkpoint's directory.
        load: What runs and what arrives.
        seconds: Of each of the two.
        interval_s: Seconds from one prompt to the next.
        seed: Of the prompts.

    Raises:
        PlatformError: The process failed.
    """
    threads = str(cpu_count())
    wanted = [str(model), asdict(load), seconds, interval_s, seed]
    done = subprocess.run(
        [sys.executable, "-m", "coldframe.benchmarks.together", json.dumps(wanted)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",  # as workers have it
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PlatformError("the one process failed", where=str(model), got=done.stderr.strip())
    quiet, busy = json.loads(done.stdout)
    return Phase(**quiet), Phase(**busy)


class _Engine:
    """Prefill and decode over one model, one after the other."""

    def __init__(self, model: str, load: Load) -> None:
        from coldframe.runtime.engine.decode import Decoder
        from coldframe.runtime.engine.prefill import Prefiller
        from coldframe.runtime.worker.text import Tokenizer

        self._spec = ModelFacts(model).spec
        self._load = load
        self._tokenizer = Tokenizer.load(model)
        each, long = blocks_of(self._spec.context_length), blocks_of(load.prompt_tokens + 1)
        blocks = each * load.decodes + long
        engine = load_model(model, blocks)
        self._prefiller, self._decoder = Prefiller(engine, lambda stage: True), Decoder(engine)
        self._blocks = [list(range(n * each, (n + 1) * each)) for n in range(load.decodes)]
        self._long_blocks = list(range(load.decodes * each, blocks))

    def window(self, seconds: float, interval_s: float | None, seed: int) -> Phase:
        """One window, with decodes of its own."""
        decodes = self._load.decodes
        for number, blocks in enumerate(self._blocks):
            prompt = self._load.short(seed + number, self._spec.vocab_size)
            tokens = self._load.decode_tokens(self._spec.context_length)
            sequence = self._sequence(str(number), prompt, tokens, blocks)
            self._prefill(sequence)
            self._decoder.admit(sequence)
        self._decoder.step()
        pace = Pace(seconds, interval_s, os.getpid())
        while not pace.over and len(self._decoder) == decodes:
            if pace.due:
                number = pace.take()
                ids = prompt_ids(
                    self._load.prompt_tokens, seed + decodes + number, self._spec.vocab_size
                )
                self._prefill(self._sequence("long", ids, 1, self._long_blocks))
                pace.answered(number)
            for sequence, _ in self._decoder.step():
                pace.token(sequence.request)
        phase = pace.close()
        for number in range(decodes):
            self._decoder.remove(str(number))
        return phase

    def _prefill(self, sequence: Sequence) -> None:
        self._prefiller.admit(sequence)
        while not self._prefiller.idle:
            self._prefiller.advance()

    def _sequence(
        self, name: str, prompt: tuple[int, ...], tokens: int, blocks: list[int]
    ) -> Sequence:
        eos_ids = self._spec.eos_token_ids
        return sequence_of(name, prompt, tokens, blocks, self._tokenizer, eos_ids)


def _main() -> None:
    model, load, seconds, interval_s, seed = json.loads(sys.argv[1])
    engine = _Engine(model, Load(**load))
    # One prompt and some steps beforehand: kernels are made when they are first used.
    engine.window(0.3, 0.2, seed)
    phases = [engine.window(seconds, None, seed + 1000)]
    phases.append(engine.window(seconds, interval_s, seed + 2000))
    print(json.dumps([asdict(phase) for phase in phases]))


if __name__ == "__main__":
    _main()
