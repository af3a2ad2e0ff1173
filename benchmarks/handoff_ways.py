"""How KV goes from a prefill worker to whoever decodes, and a request that goes that way."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.decode_host import decode_host, lacks_nixl, transfer_by
from coldframe.benchmarks.harness import cold_start
from coldframe.benchmarks.pacing import prompt_ids
from coldframe.benchmarks.peers import lacks_vllm
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.replica.vllm_spec import VllmOptions

__all__ = ["FIRST_ID", "WAYS", "Handed", "Replicated", "cold_handoff", "left_out", "start_replica"]

WAYS = ("shared", "devices", "tcp", "nixl", "vllm", "recomputed", "cold")
_ELSEWHERE = ("tcp", "nixl")
FIRST_ID = 5
"""Ids below it are a tokenizer's own."""
_SHORT = 64
"""Tokens of the prompts of those who decode meanwhile."""
_START_S = 300.0
_ANSWER_S = 120.0
_SETTLE_S = 30.0
_DEVICES = Path("/dev")


@dataclass(frozen=True, slots=True)
class Handed:
    """One request, in seconds.

    Args:
        ttft_s: To its first token, which the prefill worker makes.
        second_s: From there to its second one.
        step_s: The mean gap between the tokens behind that.
        tokens: Their ids.
    """

    ttft_s: float
    second_s: float
    step_s: float
    tokens: tuple[int, ...]


def left_out(wanted: list[str], args: argparse.Namespace) -> list[dict[str, str]]:
    """The ways that there are not here, and why."""
    why: dict[str, str] = {}
    if gpus() < 2:
        why["devices"] = f"it takes two GPUs, and there are {gpus()}"
    elif args.device == CPU:
        why["devices"] = "it takes two GPUs, and --device is cpu"
    if "nixl" in wanted and (lacks := lacks_nixl()) is not None:
        why["nixl"] = lacks
    if "vllm" in wanted and (lacks := lacks_vllm(args.vllm_python)) is not None:
        why["vllm"] = lacks
    if args.pin and cpu_count() < 2:
        why |= dict.fromkeys(wanted, "there is one core, and --pin takes two")
    return [{"what": way, "why": why[way]} for way in wanted if way in why]


def gpus() -> int:
    """GPUs of this machine; a driver that is emulated has no files of devices."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = sum(path.name[6:].isdecimal() for path in _DEVICES.glob("nvidia*"))
    return count if visible is None else min(count, len([v for v in visible.split(",") if v]))


def start_replica(stack: ExitStack, way: str, args: argparse.Namespace) -> Replicated:
    """A warm replica in which KV goes a way, until the stack is closed.

    Args:
        stack: Ends it.
        way: Of `WAYS`, but `cold`.
        args: The command line.

    Raises:
        ColdframeError: It does not start.
    """
    more: dict[str, Any] = {}
    kind: type[Replica] = Replica
    if way == "recomputed":
        # What earlier prompts and this one have left in KV would be found there.
        kind, more = _Forgetful, {"prefix_cache": False}
    elif way == "vllm":
        more = {"vllm": VllmOptions(str(args.vllm_python), alone=True), "decode": Scale(0, 0)}
    elif way == "devices":
        first = args.device
        second = "cuda:1" if first == "cuda:0" else "cuda:0"
        more = {"prefill": Scale(1, 1, first), "decode": Scale(1, 1, second)}
    elif way in _ELSEWHERE:
        flags = ["--device", args.device, *(["--pin"] if args.pin else [])]
        address = stack.enter_context(decode_host(args.model, way, flags))
        more = {"decode": Scale(0, 0), "remotes": (address,), "transfer": transfer_by(way)}
    options = ReplicaOptions(str(args.model), device=args.device, pin=args.pin, **more)
    replica = stack.enter_context(kind(options))
    deadline = time.monotonic() + _START_S
    # One that does not come up fails by itself; this is for one that does neither.
    roles = ["prefill", "vllm" if way == "vllm" else "decode"]

    def is_up() -> bool:
        ups = [replica.staff[role]["up"] for role in roles]
        if way in _ELSEWHERE:
            ups[-1] = replica.remotes_up
        return replica.known and replica.loaded and all(ups)

    replica.run_until(lambda: is_up() or time.monotonic() > deadline)
    if time.monotonic() > deadline:
        raise ReplicaError("it did not come up", where=way, expected=f"within {_START_S:g} s")
    replicated = Replicated(replica)
    replicated.hand(list(range(FIRST_ID, FIRST_ID + _SHORT)), 4, 0)
    replicated.settle()
    return replicated


class Replicated:
    """A replica that is asked from here, without HTTP.

    Args:
        replica: Warm.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._others: list[_Client] = []
        self._seed = 0

    def hand(self, prompt: list[int], tokens: int, others: int) -> Handed:
        """Asks for an answer, while so many others are decoded.

        Raises:
            ColdframeError: It was not answered.
        """
        replica = self._replica
        self._others = [self._other() for _ in range(others)]
        self._until(lambda: all(len(other.times) > 1 for other in self._others))
        before = replica.computed_again if isinstance(replica, _Forgetful) else 0
        mine = _Client()
        started = time.monotonic()
        mine.submit(replica, prompt, tokens)
        self._until(lambda: mine.done)
        for other in self._others:
            if not other.done:
                replica.cancel(other.request)
        self._others = []
        self._until(lambda: replica.idle)
        if mine.error is not None:
            raise mine.error
        if len(mine.times) != tokens:
            raise ReplicaError(
                "an answer is not whole", expected=f"{tokens} tokens", got=len(mine.times)
            )
        first, second, *_ = mine.times
        held_s = 0.0
        if isinstance(replica, _Forgetful):
            held_s = replica.held_s.pop(mine.request)
            if replica.computed_again == before:
                raise ReplicaError("the KV was there, and was to be computed again")
        step_s = (mine.times[-1] - second) / (tokens - 2)
        return Handed(first - started, second - first - held_s, step_s, tuple(mine.tokens))

    def settle(self) -> None:
        """Lets it find out in peace how large a batch of prompts should be.

        It does so once nobody has asked for two seconds, with all threads, beside whoever is
        measured then.
        """
        deadline = time.monotonic() + _SETTLE_S
        self._replica.run_until(
            lambda: "prefill_batch" in self._replica.facts or time.monotonic() > deadline
        )

    def _other(self) -> _Client:
        self._seed += 1
        spec = self._replica.spec
        prompt = prompt_ids(_SHORT, self._seed, spec.vocab_size)
        client = _Client()
        client.submit(self._replica, list(prompt), spec.context_length - _SHORT)
        return client

    def _until(self, so: Any) -> None:
        """Goes on until something is so; who has nothing left to decode is followed by another."""
        deadline = time.monotonic() + _ANSWER_S
        while not so():
            self._replica.poll()
            for place, other in enumerate(self._others):
                if other.error is not None:
                    raise other.error
                if other.done:
                    self._others[place] = self._other()
            if self._replica.error is not None:
                raise self._replica.error
            if time.monotonic() > deadline:
                raise ReplicaError("no answer came", expected=f"within {_ANSWER_S:g} s")


class _Client:
    """A request, and when its tokens came."""

    def __init__(self) -> None:
        self.request = ""
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.done = False
        self.error: ColdframeError | None = None

    def submit(self, replica: Replica, prompt: list[int], tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self.request = replica.submit(params, self, prompt_ids=tuple(prompt))

    def on_token(self, event: TokenEvent) -> None:
        self.times.append(time.monotonic())
        self.tokens.append(event.token)
        self.done = event.finish is not None

    def on_error(self, error: ColdframeError) -> None:
        self.error, self.done = error, True


class _Forgetful(Replica):
    """A replica whose memory service forgets the KV of each request that is handed over.

    A hand-off waits here until that is so, which is no part of what is measured (`held_s`). The
    decode worker finds out as it would where a lease has run out: its claim is refused.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        self.held_s: dict[str, float] = {}
        """By request, for how long its hand-off waited."""
        self._asked: list[_Held] = []
        """Those whose KV is forgotten once the memory service has answered."""
        self._next: list[_Held] = []
        """Those that came while it was being asked."""
        self._told: dict[str, int] | None = None
        super().__init__(options)

    @property
    def computed_again(self) -> int:
        """Requests whose KV a decode worker has made."""
        return sum(
            span.name == "prefill" and span.note == "between decode steps" for span in self.spans
        )

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        if message["type"] != "handoff":
            super().to_worker(worker, message)
            return
        self._next.append((time.monotonic(), worker, message))
        if not self._asked:
            self._forget()

    def step(self) -> None:
        if self._asked and self.usage is not self._told:
            for since, worker, message in self._asked:
                super().to_worker(worker, message)
                self.held_s[_request_of(message)] = time.monotonic() - since
            self._asked = []
            if self._next:
                self._forget()
        super().step()

    def _forget(self) -> None:
        self._asked, self._next = self._next, []
        for _, _, message in self._asked:
            request = _request_of(message)
            self.to_memory({"type": "release", "request": request})
            self.to_memory({"type": "open", "request": request})
        # It does what it is told in that order, so that its answer says that this is done.
        self._told = self.usage
        self.ask_usage()


_Held = tuple[float, str, dict[str, Any]]
"""A hand-off that waits: since when, for whom, and what it says."""


def _request_of(message: dict[str, Any]) -> str:
    request: str = message["handoff"]["job"]["request"]
    return request


def cold_handoff(model: Path, prompt: list[int], tokens: int) -> Handed:
    """A hand-off in a cold start: what its timeline says.

    Raises:
        PlatformError: It failed.
    """
    found = cold_start(model, prompt_ids=prompt, tokens=tokens)
    spans = {span["name"]: span for span in found["stages"]}
    handoff, decode = spans["handoff"], spans["decode"]
    return Handed(
        found["ttft_s"],
        handoff["end_s"] - handoff["start_s"],
        (decode["end_s"] - decode["start_s"]) / (tokens - 2),
        tuple(found["token_ids"]),
    )
