"""One start of one cell: a real process from its exec on, or a request to a replica at rest.

Over HTTP a thin client knocks from the exec on, as what routes requests to a container does, and
reads tokens from the stream. Without HTTP it is `coldframe run`, whose own clock begins at the same
exec. What rests (parked, warm) has had one request before, with another prompt, so that nothing of
the one that counts is in its KV.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.cold.explain import Key, asked_from, mapped, path_of, rest_timeline
from coldframe.benchmarks.cold.matrix import Cell
from coldframe.benchmarks.cold.sources import Sources
from coldframe.benchmarks.cold.standby import Standby, Template
from coldframe.benchmarks.harness import cold_start
from coldframe.benchmarks.http_client import Answer, Connection, completion, token_ids
from coldframe.benchmarks.memory import replica_pss
from coldframe.benchmarks.servers import Server, coldframe_server, knock_at
from coldframe.loader.errors import PlatformError

__all__ = ["Conditions", "Start", "Starter"]

_LIMIT_S = 900.0
_SPANS_S = 10.0
_OWN_S = 3.0
"""How long spans of a request that was answered may take to come: a start's log is closed then."""
_SETTLE_S = 1.0
"""How long a replica that is to rest is left alone: what it still does is none of a request's."""
_TIERS = {"image": "restored", "template": "template", "fresh": "fresh"}
"""What a replica calls its tier, and what the matrix does."""
_DECODE = {"native": (), "vllm": ("--decode", "vllm"), "bridge": ("--decode", "native,vllm")}


@dataclass(frozen=True, slots=True)
class Start:
    """One start as it was measured.

    Args:
        ttft_s: From the exec, or from the request to a replica at rest, until the first token.
        last_token_s: From there until the last one.
        tokens: Their ids.
        timeline: What the replica says of it, as `Timeline.to_json` makes it: of a rest, from the
            request on, and None where it does not say.
        path: What the first token was waiting for, in seconds.
        memory: PSS of all its processes after the answer, in bytes; None where that cannot be
            told.
        mapped: Whether its weights were mapped where the page cache has them, not copied.
    """

    ttft_s: float
    last_token_s: float
    tokens: tuple[int, ...]
    timeline: Mapping[str, Any] | None
    path: Mapping[Key, float]
    memory: int | None
    mapped: bool


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which a cell starts.

    Args:
        uri: Where its weights are.
        flags: Those of its command.
        environment: What is in its environment besides.
        store: The images that its workers are made of, or None.
        template: What forks its workers, or None.
    """

    uri: str
    flags: Sequence[str]
    environment: Mapping[str, str]
    store: Path | None
    template: Template | None


class Starter:
    """Starts cells of one model.

    Args:
        sources: Where weights come from.
        standby: Images and the template.
        run_dir: The run directory of all starts but those by the template.
        prompt: Token ids, the same for all.
        tokens: Of each answer.
        why_no_memory: Gets the reason where the memory of a replica cannot be told.
    """

    def __init__(
        self,
        sources: Sources,
        standby: Standby,
        run_dir: Path,
        prompt: Sequence[int],
        tokens: int,
        why_no_memory: set[str],
    ) -> None:
        self._sources = sources
        self._standby = standby
        self._run_dir = run_dir
        self._prompt = list(prompt)
        self._tokens = tokens
        self._why_no_memory = why_no_memory

    @contextmanager
    def conditions(self, cell: Cell) -> Iterator[Conditions]:
        """What a start of the cell needs, while the context lasts.

        Raises:
            PlatformError: It cannot be had here.
        """
        with ExitStack() as stack:
            flags = list(_DECODE[cell.engine])
            if cell.engine != "native":
                flags += self._standby.engine.flags
            if cell.throttle is not None:
                flags += ["--throttle", f"{cell.throttle:.0f}B/s"]
            environment = {"COLDFRAME_RUN_DIR": str(self._run_dir)}
            template = store = None
            place = stack.enter_context(self._sources.place(cell.source))
            if cell.tier == "restored":
                store = self._standby.store(cell.engine, cell.source, place)
                environment["COLDFRAME_SNAPSHOT"] = "require"
                environment["COLDFRAME_SNAPSHOT_STORE"] = str(store)
            elif cell.tier == "template":
                template = stack.enter_context(self._standby.template())
                environment["COLDFRAME_SNAPSHOT"] = "require"
                environment["COLDFRAME_SNAPSHOT_STORE"] = str(self._run_dir / "no-images")
                environment["COLDFRAME_RUN_DIR"] = str(template.run_dir)
            environment |= place.environment
            yield Conditions(place.uri, flags, environment, store, template)

    def start(self, cell: Cell, prepare: Callable[[Conditions], None]) -> Start:
        """Starts the cell once.

        Args:
            cell: The cell.
            prepare: Called when all else is ready, just before the exec: makes the page cache what
                it is to be.

        Raises:
            PlatformError: It failed, gave no answer, or came up by another tier.
        """
        with self.conditions(cell) as conditions:
            prepare(conditions)
            if cell.through == "run":
                return self._by_run(cell, conditions)
            return self._over_http(cell, conditions)

    def _by_run(self, cell: Cell, conditions: Conditions) -> Start:
        found = cold_start(
            conditions.uri,
            *conditions.flags,
            prompt_ids=self._prompt,
            tokens=self._tokens,
            environment=conditions.environment,
            limit_s=_LIMIT_S,
        )
        snapshot = found["snapshot"] or {"tier": "fresh"}
        _check_tier(cell, snapshot["tier"], (snapshot.get("engine") or {}).get("tier"))
        timeline = {
            name: found[name] for name in ("ttft_s", "stages", "critical_path", "unattributed_s")
        }
        tokens, last = tuple(found["token_ids"]), found["token_times_s"][-1]
        ttft = found["ttft_s"]
        path = path_of(timeline, ttft)
        memory = found.get("memory_bytes")
        return Start(ttft, last, tokens, timeline, path, memory, mapped(timeline))

    def _over_http(self, cell: Cell, conditions: Conditions) -> Start:
        body = completion("m", self._prompt, self._tokens, stream=True, ids=True)
        environment, flags = conditions.environment, conditions.flags
        with coldframe_server(conditions.uri, *flags, environment=environment) as server:
            sock = knock_at(server, server.started_ns + int(_LIMIT_S * 1e9))
            with Connection(sock, _LIMIT_S) as connection:
                if cell.rests:
                    first = self._bring_to_rest(cell, connection)
                answer = connection.post("/v1/completions", body)
                tokens = tuple(token_ids(answer))
                memory = self._memory(conditions, server)
                began = answer.sent_ns if cell.rests else server.started_ns
                ttft, last = ((t - began) / 1e9 for t in (answer.first_ns, answer.last_ns))
                if cell.rests:
                    told = _of_request(connection, answer, ttft)
                    path = _waited(answer, ttft) if told is None else path_of(told, ttft)
                    return Start(ttft, last, tokens, told, path, memory, mapped(first))
                startup = _explained(connection, server.since_exec(answer.sent_ns))
        _check_tier(cell, startup["tier"], (startup.get("decode") or {}).get("tier"))
        timeline = startup["timeline"]
        path = path_of(timeline, ttft)
        return Start(ttft, last, tokens, timeline, path, memory, mapped(timeline))

    def _bring_to_rest(self, cell: Cell, connection: Connection) -> Mapping[str, Any]:
        """Returns the timeline of the start before it."""
        other = [token + 1 for token in self._prompt]
        connection.post("/v1/completions", completion("m", other, self._tokens, stream=False))
        timeline: Mapping[str, Any] = _explained(connection)["timeline"]
        if cell.engine != "native":
            _await(connection, lambda said: (said["decode"] or {}).get("engine") == "vllm", cell)
        time.sleep(_SETTLE_S)
        if cell.tier == "parked":
            connection.post("/sleep?level=1", b"")
            _await(connection, lambda said: said["state"] == "parked", cell)
            time.sleep(_SETTLE_S)
        return timeline

    def _memory(self, conditions: Conditions, server: Server) -> int | None:
        try:
            forks = () if conditions.template is None else conditions.template.forks()
            return replica_pss(server.pid, *forks)
        except PlatformError as error:
            self._why_no_memory.add(str(error))
            return None


def _explained(connection: Connection, sent_s: float = 0.0) -> dict[str, Any]:
    """`/startup`, once the spans of those who made the first token have come.

    Args:
        connection: To the replica.
        sent_s: When the request that is to be explained was sent, in seconds from the exec on.

    Raises:
        PlatformError: They do not come.
    """
    began = time.monotonic()
    while True:
        said: dict[str, Any] = json.loads(connection.get("/startup").body)
        timeline = said["timeline"] or {"stages": []}
        waited = time.monotonic() - began
        if timeline.get("ttft_s") is not None:
            heads = [s["end_s"] for s in timeline["stages"] if s["name"] == "prefill[head]"]
            # A log that is closed sooner has no spans of the client's own: then they are unknown.
            if heads and (waited > _OWN_S or max(heads) > asked_from(timeline, sent_s)):
                return said
        if waited > _SPANS_S:
            names = sorted({stage["name"] for stage in timeline["stages"]})
            raise PlatformError("a start has no timeline", got=names)
        time.sleep(0.02)


def _await(connection: Connection, reached: Any, cell: Cell) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        said = json.loads(connection.get("/startup").body)
        if reached(said):
            return
        if time.monotonic() > deadline:
            raise PlatformError("a replica does not come to rest", where=cell.id, got=said["state"])
        time.sleep(0.05)


def _check_tier(cell: Cell, tier: str | None, engine: str | None) -> None:
    got = _TIERS.get(tier or "")
    if got != cell.tier:
        raise PlatformError(
            "a start came up by another tier", where=cell.id, expected=cell.tier, got=tier
        )
    if cell.tier == "restored" and cell.engine == "vllm" and engine != "image":
        raise PlatformError(
            "a vLLM engine came up by another tier", where=cell.id, expected="image", got=engine
        )


def _of_request(connection: Connection, answer: Answer, ttft_s: float) -> dict[str, Any] | None:
    """What became of a request to a replica that was there; None where its spans do not come."""
    queue_s = _timing(answer).get("queue", 0.0)
    until = time.monotonic() + _SPANS_S
    while time.monotonic() < until:
        said = json.loads(connection.get("/startup").body)
        latest = said["latest"]
        sent_s = (answer.sent_ns - latest["began_ns"]) / 1e9
        told = rest_timeline(latest["stages"], sent_s, ttft_s, queue_s)
        if told is not None:
            return told
        time.sleep(0.02)
    return None


def _timing(answer: Answer) -> dict[str, float]:
    """What the gateway says of a request, in seconds."""
    said = {}
    for part in answer.headers.get("server-timing", "").split(","):
        name, _, duration = part.strip().partition(";dur=")
        if duration:
            said[name] = float(duration) / 1e3
    return said


def _waited(answer: Answer, ttft_s: float) -> dict[Key, float]:
    """Where the time to the first token went, by what the gateway says of the request."""
    said = _timing(answer)
    queue = min(said.get("queue", 0.0), ttft_s)
    replica = min(said.get("first_token", 0.0), ttft_s) - queue
    found = {("gateway", "queue"): queue, ("replica", "first_token"): max(replica, 0.0)}
    return {**found, ("client", "first_token"): ttft_s - sum(found.values())}
