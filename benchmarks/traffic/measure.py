"""How long the stages of a model's life take here: measured on a live server that nobody else asks.

In each cycle the model is sent to zero, asked, asked again while it is warm, with a short prompt,
with a long one and several at once, parked, and asked; then it and another one are asked together,
both at zero. What a start takes is what its first token took longer than that of a warm model with
a prompt as long.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from coldframe.benchmarks.servers import Server
from coldframe.benchmarks.traffic.client import ask, prompt_of
from coldframe.benchmarks.traffic.live import Fleet, get, post, settled
from coldframe.benchmarks.traffic.open_loop import Record
from coldframe.benchmarks.traffic.stages import Line, Times
from coldframe.benchmarks.traffic.statelog import changes
from coldframe.loader.errors import PlatformError, RequestError

__all__ = ["measure"]

_SHORT = 16
_TOKENS = 24
_BATCH = 4
_QUIET_S = 1.0
"""What a start still does behind its first token is none of the next cycle's."""
_LOG_S = 10.0
"""How late the log may be at most."""
_LOOK_S = 0.05
_FIRST_NUMBER = 1 << 20
"""Prompts are no replay's."""


def measure(fleet: Fleet, context: int, cycles: int, rest_s: float = 0.0) -> Times:
    """The stages of a fleet's first model, which is to be as all others are.

    Args:
        fleet: The models; the first alone is asked, and with it the second once in each cycle.
        context: The longest prompt that is asked with, in tokens.
        cycles: How often each stage is measured.
        rest_s: How long a model is at zero before it is asked; see `runtime.machine.free_memory`.

    Raises:
        RequestError: There are no cycles.
        PlatformError: The server failed.
    """
    if cycles < 1:
        raise RequestError("there must be one", where="--cycles", got=cycles)
    with fleet.serve() as server:
        return _Cycles(server, fleet.names, fleet.vocabulary, context, rest_s).run(cycles)


class _Cycles:
    def __init__(
        self,
        server: Server,
        names: Sequence[str],
        vocabulary: int,
        context: int,
        rest_s: float,
    ) -> None:
        self._server = server
        self._rest_s = rest_s
        self._names = names[:2]
        self._name = names[0]
        self._vocabulary = vocabulary
        self._long = max(_SHORT + 1, context - _TOKENS)
        self._number = _FIRST_NUMBER
        self._starts: list[tuple[str | None, float]] = []
        self._parked: list[float] = []
        self._ends: list[float] = []
        self._short: list[float] = []
        self._longer: list[float] = []
        self._second: list[float] = []
        self._beside: list[float] = []
        self._alone: list[float] = []
        self._together: list[float] = []

    def run(self, cycles: int) -> Times:
        settled(self._server, {"ready", "zero"})
        self._first_token_s(_SHORT)  # also of a server that is new
        for number in range(cycles):
            print(f"stages: cycle {number + 1} of {cycles}", file=sys.stderr)
            self._cycle()
        warm_s = statistics.median(self._short)
        each_s = max(0.0, statistics.median(self._longer) - warm_s) / (self._long - _SHORT)
        step_s = statistics.median(self._alone)
        more_s = max(0.0, statistics.median(self._together) - step_s) / (_BATCH - 1)

        def beyond(runs: list[float]) -> list[float]:
            return [max(0.0, run - warm_s) for run in runs]

        # Of two at the same time.
        apart_s = statistics.mean(run for _, run in self._starts)
        beside = max(0.0, statistics.mean(self._beside) / apart_s - 1) if self._beside else 0.0
        restored = [run for tier, run in self._starts if tier == "image"]
        fresh = [run for tier, run in self._starts if tier != "image"]
        return Times(
            fresh=beyond(fresh),
            restored=beyond(restored),
            parked=beyond(self._parked),
            end=self._ends,
            prefill=Line(max(0.0, warm_s - each_s * _SHORT), each_s),
            decode=Line(max(0.0, step_s - more_s), more_s),
            how=f"measured here in {cycles} cycles",
            behind=[max(0.0, run - step_s) for run in self._second],
            beside=beside,
        )

    def _cycle(self) -> None:
        place = f"model={self._name}"
        self._ends.append(self._end_s(f"/sleep?level=2&{place}"))
        time.sleep(self._rest_s)
        start = ask(self._server, self._name, self._prompt(_SHORT), 2)
        self._second.append(_behind_s(start))
        tier = json.loads(get(self._server, f"/startup?{place}"))["tier"]
        self._starts.append((tier, _ttft_s(start)))
        time.sleep(_QUIET_S)
        self._short.append(self._first_token_s(_SHORT))
        self._longer.append(self._first_token_s(self._long))
        self._alone.append(self._step_s())
        with ThreadPoolExecutor(_BATCH) as clients:
            steps = [clients.submit(self._step_s) for _ in range(_BATCH)]
            self._together.append(statistics.median(step.result() for step in steps))
        time.sleep(_QUIET_S)
        post(self._server, f"/sleep?level=1&{place}")
        self._settle("parked")
        self._parked.append(self._first_token_s(_SHORT))
        time.sleep(_QUIET_S)
        if len(self._names) > 1:
            self._both()
            post(self._server, f"/sleep?level=2&model={self._names[1]}")
            settled(self._server, {"ready", "zero"})

    def _both(self) -> None:
        """Two models at the same time: how long the first one's first token takes then."""
        post(self._server, "/sleep?level=2")
        settled(self._server, {"zero"})
        time.sleep(self._rest_s)
        with ThreadPoolExecutor(len(self._names)) as clients:
            asked = [
                clients.submit(ask, self._server, name, self._prompt(_SHORT), 2)
                for name in self._names
            ]
            self._beside += [_ttft_s(one.result()) for one in asked]
        time.sleep(_QUIET_S)

    def _end_s(self, order: str) -> float:
        """Ends the replica: how long that takes by the log; the order is answered before."""
        ordered_s = time.monotonic()
        post(self._server, order)
        self._settle("zero")
        late_s = time.monotonic() + _LOG_S
        while True:
            told = changes(self._server.words(), self._names)
            own = [c.at_s for c in told if c.model == self._name and c.state == "zero"]
            if own and own[-1] >= ordered_s:
                return own[-1] - ordered_s
            if time.monotonic() > late_s:
                raise PlatformError("a server's log does not say that a model is at zero")
            time.sleep(_LOOK_S)

    def _settle(self, state: str) -> None:
        settled(self._server, {state, "zero"})

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        self._number += 1
        return prompt_of(self._number, tokens, self._vocabulary)

    def _first_token_s(self, tokens: int) -> float:
        return _ttft_s(ask(self._server, self._name, self._prompt(tokens), 2))

    def _step_s(self) -> float:
        return _behind_s(ask(self._server, self._name, self._prompt(_SHORT), _TOKENS)) / (
            _TOKENS - 1
        )


def _ttft_s(answered: Record) -> float:
    assert answered.first_s is not None
    return answered.first_s - answered.sent_s


def _behind_s(answered: Record) -> float:
    """From the first token to the answer's end."""
    assert answered.first_s is not None
    assert answered.end_s is not None
    return answered.end_s - answered.first_s
