"""Prefill and decode in one process, behind the same arrivals: an engine without separate workers.

There is no such replica, so this is for measuring alone: the same engine, weights and threads, in
a process of its own. Of the prompts that have come one is computed as a whole between two decode
steps, first come first served. No server and no sockets lie on the way of a request or a token,
which is to this one's advantage.

    python -m coldframe.benchmarks.traffic.one_process '{"model": ..., "longest": ...}'

It reads loads from standard input, one JSON document a line, and answers each with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from coldframe.benchmarks.in_process import load_model, sequence_of
from coldframe.benchmarks.traffic.arrivals import Ask
from coldframe.benchmarks.traffic.open_loop import Record
from coldframe.loader.cgroup import cpu_count, memory_available
from coldframe.loader.errors import PlatformError
from coldframe.runtime.replica.loads import blocks_of
from coldframe.runtime.replica.sizing import ModelFacts

if TYPE_CHECKING:
    from coldframe.runtime.engine.sequence import Sequence as EngineSequence

__all__ = ["OneProcess"]

_RUNNING = 32
"""Requests that there is KV for at once, each as long as the longest: as many as `serve` runs."""
_MOST_KV = 4 << 30


class OneProcess:
    """The process, while the context lasts.

    Args:
        model: A checkpoint's directory.
        longest: Tokens of the longest request, prompt and answer.

    Raises:
        PlatformError: It does not come up, or fails.
    """

    def __init__(self, model: Path, longest: int) -> None:
        threads = str(cpu_count())
        wanted = json.dumps({"model": str(model), "longest": longest})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coldframe.benchmarks.traffic.one_process", wanted],
            env={
                **os.environ,
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "OMP_WAIT_POLICY": "PASSIVE",  # as workers have it
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def offer(self, asks: Sequence[Ask]) -> list[Record]:
        """Plays a load, and returns what became of each request, in their order.

        A request counts as sent when it was due: nobody has to notice that it is.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([astuple(ask) for ask in asks]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PlatformError(
                "the one process failed", hint="What it said last is on standard error."
            )
        return [
            Record(ask.due_s, len(ask.prompt), ask.tokens, ask.due_s, times, times[-1], len(times))
            for ask, times in zip(asks, json.loads(line), strict=True)
        ]


class _Engine:
    def __init__(self, model: str, longest: int) -> None:
        from coldframe.runtime.engine.decode import Decoder
        from coldframe.runtime.engine.prefill import Prefiller
        from coldframe.runtime.worker.tensors import torch_dtypes
        from coldframe.runtime.worker.text import Tokenizer

        self._spec = ModelFacts(model).spec
        self._tokenizer = Tokenizer.load(model)
        block_bytes = self._spec.kv_block_bytes(torch_dtypes()[self._spec.dtype].itemsize)
        room = min(_MOST_KV, memory_available() // 4)
        each = blocks_of(longest)
        blocks = max(each, min(_RUNNING * each, room // block_bytes))
        engine = load_model(model, blocks)
        self._prefiller, self._decoder = Prefiller(engine, lambda stage: True), Decoder(engine)
        self._free = list(range(blocks))

    def play(self, asks: Sequence[Ask]) -> list[list[float]]:
        """When each token of each request was there, in seconds since the load's start."""
        times: list[list[float]] = [[] for _ in asks]
        due = deque(range(len(asks)))
        waiting: deque[int] = deque()
        start = time.monotonic()
        while due or waiting or len(self._decoder):
            while due and asks[due[0]].due_s <= time.monotonic() - start:
                waiting.append(due.popleft())
            if waiting and self._needs(asks[waiting[0]]) <= len(self._free):
                number = waiting.popleft()
                self._prefill(str(number), asks[number])
                times[number].append(time.monotonic() - start)
            if len(self._decoder):
                stepped = self._decoder.step()
                moment = time.monotonic() - start
                for sequence, emission in stepped:
                    times[int(sequence.request)].append(moment)
                    if emission.finish is not None:
                        self._free += sequence.blocks
            elif not waiting and due:
                time.sleep(max(0.0, start + asks[due[0]].due_s - time.monotonic()))
        return times

    def _needs(self, ask: Ask) -> int:
        return blocks_of(len(ask.prompt) + ask.tokens)

    def _prefill(self, name: str, ask: Ask) -> None:
        blocks = [self._free.pop() for _ in range(self._needs(ask))]
        eos_ids = self._spec.eos_token_ids
        sequence = sequence_of(name, ask.prompt, ask.tokens, blocks, self._tokenizer, eos_ids)
        self._prefiller.admit(sequence)
        finished: list[tuple[EngineSequence, Any]] = []
        while not self._prefiller.idle:
            finished += self._prefiller.advance() or []
        ((_, emission),) = finished
        if emission.finish is None:
            self._decoder.admit(sequence)
        else:
            self._free += sequence.blocks


def _main() -> None:
    engine = _Engine(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        asks = [Ask(due, tuple(prompt), tokens) for due, prompt, tokens in json.loads(line)]
        print(json.dumps(engine.play(asks)), flush=True)


if __name__ == "__main__":
    _main()
