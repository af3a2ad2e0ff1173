"""`coldframe bench interference MODEL`: what running decodes feel of prompts that arrive.

Eight requests are decoded; the gap between two tokens of one of them is what its reader waits.
Then the same while prompts of 2,000 tokens arrive, at a rate that a prefill worker with its half of
the cores can just keep up with. Three ways to serve both, on the same cores, turn by turn:

- `pinned`: prefill and decode in workers of their own, each with one half of the cores;
- `apart`: the same workers, on all cores: the kernel decides whose turn it is;
- `together`: one process that computes each prompt as a whole between two decode steps.

Each ratio is to the same way without prompts. What a prompt waits for its own first token stands
beside it: that is what decodes left alone cost. So does for how long decode had no core: on a
machine with other work the gaps are longer for that, and not for the prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from coldframe.benchmarks.harness import Row, print_rows, warm_page_cache
from coldframe.benchmarks.pacing import Load, Pace, Phase, prompt_ids
from coldframe.benchmarks.together import measure_together
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "run"]

_TARGET = 1.5
_WAYS = ("pinned", "apart", "together")
_ONE_PROMPT = (0.3, 0.2)
"""A window and an interval in which one prompt arrives."""
_SLACK = 1.1
"""How much longer than its own prefill the interval between two prompts is."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--runs", type=int, default=3, help="runs of each way (3)")
    parser.flag("--prompts", type=int, default=5, help="prompts that arrive in each window (5)")
    parser.flag("--prompt-tokens", type=int, default=2000, help="of each of them (2000)")
    parser.flag("--decodes", type=int, default=8, help="requests that are decoded meanwhile (8)")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether the target is met.

    Raises:
        ColdframeError: A replica failed, or the machine has one core.
    """
    load = Load(args.decodes, args.prompt_tokens)
    cells: dict[str, list[tuple[Phase, Phase]]] = {way: [] for way in _WAYS}
    warm_page_cache(args.model)
    interval_s = _interval_s(args.model, load)
    seconds = args.prompts * interval_s
    print(f"a prompt each {interval_s:.2f} s, windows of {seconds:.1f} s", file=sys.stderr)
    for number in range(args.runs):
        seed = 10_000 * (number + 1)
        for way, found in cells.items():
            print(f"run {number + 1} of {args.runs}: {way}", file=sys.stderr)
            if way == "together":
                found.append(measure_together(args.model, load, seconds, interval_s, seed))
            else:
                found.append(
                    _in_workers(args.model, way == "pinned", load, seconds, interval_s, seed)
                )
    rows = [row for way, found in cells.items() for row in _rows(way, found)]
    more = {
        "model": str(args.model),
        "runs": args.runs,
        "prompt_tokens": load.prompt_tokens,
        "decodes": load.decodes,
        "interval_s": interval_s,
        "window_s": seconds,
    }
    print_rows(rows, more)
    return 0 if all(row.met is not False for row in rows) else 1


def _rows(way: str, found: list[tuple[Phase, Phase]]) -> list[Row]:
    quiet, busy = zip(*found, strict=True)
    before = [phase.percentile_ms(99) for phase in quiet]
    during = [phase.percentile_ms(99) for phase in busy]
    return [
        Row(f"{way}: p99 gap, undisturbed", before, "ms"),
        Row("  while prompts arrive", during, "ms"),
        Row(
            "  ratio",
            [b / a for a, b in zip(before, during, strict=True)],
            "ratio",
            _TARGET if way == "pinned" else None,
        ),
        Row("  median gap, undisturbed", [phase.percentile_ms(50) for phase in quiet], "ms"),
        Row("  while prompts arrive", [phase.percentile_ms(50) for phase in busy], "ms"),
        Row("  decode had no core, undisturbed", [100 * p.waited for p in quiet], "% of time"),
        Row("  while prompts arrive", [100 * p.waited for p in busy], "% of time"),
        Row("  longest gap while prompts arrive", [p.percentile_ms(100) for p in busy], "ms"),
        Row("  a prompt's first token", [statistics.median(p.ttft_s) for p in busy], "s"),
    ]


class _Client:
    """One of the requests."""

    def __init__(self, pace: Pace | None = None, number: int = 0) -> None:
        self.pace = pace
        self.tokens = 0
        self.request = ""
        self.done = False
        self.error: ColdframeError | None = None
        self._number = number

    def on_token(self, event: TokenEvent) -> None:
        self.tokens += 1
        self.done = event.finish is not None
        if self.pace is None:
            return
        if self.done:
            self.pace.answered(self._number)
        else:
            self.pace.token(self.request)

    def on_error(self, error: ColdframeError) -> None:
        self.error, self.done = error, True


def _interval_s(model: Path, load: Load) -> float:
    """How long a prefill worker takes for a prompt beside decodes, and a bit."""
    with Replica(ReplicaOptions(str(model), pin=True)) as replica:
        _check(replica, load)
        found = [_window(replica, load, *_ONE_PROMPT, seed) for seed in (1000, 2000, 3000)]
    # The least of them: whatever else the machine did, it was not that.
    return min(phase.ttft_s[0] for phase in found) * _SLACK


def _in_workers(
    model: Path, pin: bool, load: Load, seconds: float, interval_s: float, seed: int
) -> tuple[Phase, Phase]:
    with Replica(ReplicaOptions(str(model), pin=pin)) as replica:
        _check(replica, load)
        _window(replica, load, *_ONE_PROMPT, seed)  # kernels are made when first used
        quiet = _window(replica, load, seconds, None, seed + 1000)
        return quiet, _window(replica, load, seconds, interval_s, seed + 2000)


def _check(replica: Replica, load: Load) -> None:
    """Waits until the model is known.

    Raises:
        RequestError: The prompts are longer than it takes.
    """
    replica.run_until(lambda: replica.known)
    if load.prompt_tokens >= replica.spec.context_length:
        raise RequestError(
            "the prompts do not fit the model's context",
            where="--prompt-tokens",
            expected=f"less than {replica.spec.context_length}",
            got=load.prompt_tokens,
        )


def _window(
    replica: Replica, load: Load, seconds: float, interval_s: float | None, seed: int
) -> Phase:
    """One window, with decodes of its own."""
    vocabulary = replica.spec.vocab_size
    tokens = load.decode_tokens(replica.spec.context_length)
    decodes = [_Client() for _ in range(load.decodes)]
    for number, client in enumerate(decodes):
        _submit(replica, client, load.short(seed + number, vocabulary), tokens)
    replica.run_until(lambda: any(c.error for c in decodes) or all(c.tokens > 1 for c in decodes))
    (pid,) = [pid for name, pid in replica.pids.items() if name.startswith("decode")]
    pace = Pace(seconds, interval_s, pid)
    for client in decodes:
        client.pace = pace
    prompts: list[_Client] = []
    while not pace.over and not any(client.done for client in decodes):
        if pace.due:
            prompts.append(_Client(pace, pace.take()))
            ids = prompt_ids(load.prompt_tokens, seed + load.decodes + len(prompts), vocabulary)
            _submit(replica, prompts[-1], ids, 1)
        replica.poll(pace.wait_s)
    phase = pace.close()
    for client in decodes:
        client.pace = None
        replica.cancel(client.request)
    replica.run_until(lambda: all(client.done for client in prompts))
    for client in (*decodes, *prompts):
        if client.error is not None:
            raise client.error
    return phase


def _submit(replica: Replica, client: _Client, prompt: tuple[int, ...], tokens: int) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    client.request = replica.submit(params, client, prompt_ids=prompt)
