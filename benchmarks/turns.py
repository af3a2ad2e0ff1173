"""`coldframe bench turns MODEL`: a chat's next turn while a long prompt is being prefilled.

Some requests are decoded, a prompt of 4,000 tokens is prefilled, and meanwhile turns of chats come
one after the other: 1,000 tokens that are in KV from the turn before, and 30 new ones. Those are
computed by the prefill worker in turn with the long prompt, or by the decode worker between its
steps (`--local-prefill`). What counts is a turn's time to its first token, and the gap between two
tokens of those that are decoded. Each run has both ways, on replicas of their own, and each way the
same once more without a long prompt.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows, warm_page_cache
from coldframe.benchmarks.pacing import Load, Pace, Phase, prompt_ids
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "run"]

_PAUSE_S = 0.2
"""Between the first token of a turn and the next turn."""
_QUIET_TURNS = 5
"""Turns without a long prompt."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=3, help="runs of each way (3)")
    parser.flag("--long", type=int, default=4000, help="tokens of the long prompt (4000)")
    parser.flag("--prefix", type=int, default=1000, help="tokens of a turn that are in KV (1000)")
    parser.flag("--rest", type=int, default=30, help="tokens of a turn behind it (30)")
    parser.flag("--decodes", type=int, default=8, help="requests that are decoded meanwhile (8)")
    parser.flag(
        "--local-prefill",
        metavar="TOKENS",
        type=int,
        default=ReplicaOptions("").local_prefill,
        help="of a prompt, that a decode worker computes (64)",
    )
    parser.flag("--pin", action="store_true", help="one half of the cores for each role")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        ColdframeError: A replica failed.
    """
    warm_page_cache(args.model)
    found: dict[int, list[_Window]] = {0: [], args.local_prefill: []}
    quiet: dict[int, list[_Window]] = {0: [], args.local_prefill: []}
    for number in range(args.runs):
        for tokens in found:
            print(f"run {number + 1} of {args.runs}: --local-prefill {tokens}", file=sys.stderr)
            options = ReplicaOptions(
                str(args.model), local_prefill=tokens, pin=args.pin, device=args.device
            )
            with Replica(options) as replica:
                bench = _Bench(replica, args, seed=10_000 * (number + 1))
                bench.window(with_long=False)  # kernels are made when first used
                quiet[tokens].append(bench.window(with_long=False))
                found[tokens].append(bench.window(with_long=True))
    rows = [row for tokens in found for row in _rows(tokens, quiet[tokens], found[tokens])]
    names = ("long", "prefix", "rest", "decodes", "pin")
    print_rows(rows, {"model": str(args.model), **{name: getattr(args, name) for name in names}})
    return 0


class _Window:
    """What came out of one window: a turn's first tokens, the gaps, and the long prompt's own."""

    def __init__(self, ttft_s: list[float], phase: Phase, long_s: float, by_decode: int) -> None:
        self.ttft_s = ttft_s
        self.phase = phase
        self.long_s = long_s
        self.by_decode = by_decode


def _rows(tokens: int, quiet: list[_Window], busy: list[_Window]) -> list[Row]:
    return [
        Row(
            f"--local-prefill {tokens}: a turn's first token, mean",
            [statistics.mean(window.ttft_s) for window in busy],
            "s",
        ),
        Row("  median", [statistics.median(window.ttft_s) for window in busy], "s"),
        Row("  the slowest of them", [max(window.ttft_s) for window in busy], "s"),
        Row("  without a long prompt", [statistics.median(w.ttft_s) for w in quiet], "s"),
        Row("  turns", [len(window.ttft_s) for window in busy], "count"),
        Row("  of them computed by the decode worker", [w.by_decode for w in busy], "count"),
        Row("  p99 gap of decodes", [w.phase.percentile_ms(99) for w in busy], "ms"),
        Row("  median gap", [w.phase.percentile_ms(50) for w in busy], "ms"),
        Row("  p99 gap without a long prompt", [w.phase.percentile_ms(99) for w in quiet], "ms"),
        Row("  the long prompt's first token", [window.long_s for window in busy], "s"),
    ]


class _Client:
    def __init__(self) -> None:
        self.request = ""
        self.pace: Pace | None = None
        self.tokens = 0
        self.done = False
        self.at = 0.0
        self.cached = 0
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self.tokens += 1
        self.done = event.finish is not None
        if event.index == 0:
            self.at, self.cached = time.monotonic(), event.cached_tokens
        if self.pace is not None:
            self.pace.token(self.request)

    def on_error(self, error: ColdframeError) -> None:
        self.error, self.done = error, True


class _Bench:
    """One replica's windows."""

    def __init__(self, replica: Replica, args: argparse.Namespace, seed: int) -> None:
        self._replica = replica
        self._args = args
        self._seed = seed
        replica.run_until(lambda: replica.known)
        context = replica.spec.context_length
        if max(args.long, args.prefix + args.rest) >= context:
            raise RequestError(
                "the prompts do not fit the model's context",
                where="--long",
                expected=f"less than {context}",
                got=max(args.long, args.prefix + args.rest),
            )

    def window(self, *, with_long: bool) -> _Window:
        """Turns beside running decodes, and beside a long prompt until that has its token."""
        args, replica = self._args, self._replica
        chat = self._prompt(args.prefix)
        self._finish(self._submit(chat, 1))
        load = Load(args.decodes, args.long)
        tokens = load.decode_tokens(replica.spec.context_length)
        decodes = [self._submit(self._prompt(64), tokens) for _ in range(args.decodes)]
        replica.run_until(lambda: all(client.tokens > 1 for client in decodes))
        (pid,) = [pid for name, pid in replica.pids.items() if name.startswith("decode")]
        pace = Pace(0.0, None, pid)
        for client in decodes:
            client.pace = pace
        before = replica.prefilled_by_decode
        began = time.monotonic()
        long = self._submit(self._prompt(args.long), 1) if with_long else None
        waited: list[float] = []
        while not waited or (len(waited) < _QUIET_TURNS if long is None else not long.done):
            started = time.monotonic()
            turn = self._submit((*chat, *self._prompt(args.rest)), 1)
            self._finish(turn)
            waited.append(turn.at - started)
            self._wait(_PAUSE_S)
        if long is not None:
            self._finish(long)
        phase = pace.close()
        for client in decodes:
            client.pace = None
            replica.cancel(client.request)
        long_s = 0.0 if long is None else long.at - began
        return _Window(waited, phase, long_s, replica.prefilled_by_decode - before)

    def _wait(self, seconds: float) -> None:
        late = time.monotonic() + seconds
        while (left := late - time.monotonic()) > 0:
            self._replica.poll(left)

    def _prompt(self, length: int) -> tuple[int, ...]:
        self._seed += 1
        return prompt_ids(length, self._seed, self._replica.spec.vocab_size)

    def _submit(self, prompt: tuple[int, ...], tokens: int) -> _Client:
        client = _Client()
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        client.request = self._replica.submit(params, client, prompt_ids=prompt)
        return client

    def _finish(self, client: _Client) -> None:
        self._replica.run_until(lambda: client.done)
        if client.error is not None:
            raise client.error
