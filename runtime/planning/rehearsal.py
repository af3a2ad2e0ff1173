"""A start in small: the replica's own processes, over a scale model, timed and weighed.

What a start takes beside the bytes is not guessed from constants, nor from the import of torch in
one process: front, memory service, both workers and the gateway are started as `coldframe run` and
`coldframe serve` start them, so that what they take from one another on few cores is in the times,
and what they share is in the memory. The weights of the model itself are never read for it.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.runtime.planning.endpoint_client import ask, first_token_ns, free_port, knock
from coldframe.runtime.planning.footprint import Footprint, footprint
from coldframe.runtime.planning.law import Worker
from coldframe.runtime.planning.processes import end_process, held, read_until, start_process
from coldframe.runtime.planning.processor import busy_processors, idle_s
from coldframe.runtime.planning.scale_model import ScaleModel

__all__ = ["Rehearsed", "Resting", "rehearse_run", "rehearse_serve", "worker_of"]

_PATIENCE_S = 120.0
_TOKENS = (16, 128, 1024)
"""Of a run's answer; the more where with the fewer it was over before it was looked at."""
_MODEL = "scale"
_RESTS = {"warm": None, "parked": "/sleep?level=1"}


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a start of the scale model took.

    Args:
        worker: The times, of the scale model's own layers and head.
        memory: Of all processes, when the first answer was under way or over.
    """

    worker: Worker
    memory: Footprint


@dataclass(frozen=True, slots=True)
class Resting:
    """Seconds from a request to its first token, of a replica that rests, by how it rests."""

    ttft_s: Mapping[str, float]


def rehearse_run(
    scale: ScaleModel,
    prompt: Sequence[int],
    arguments: Sequence[str],
    snapshot: Mapping[str, str],
    template: int | None = None,
) -> Rehearsed:
    """One `coldframe run`.

    Args:
        scale: The scale model.
        prompt: Token ids.
        arguments: More flags.
        snapshot: The environment that says how workers start.
        template: The process whose forks they are, if any.

    Raises:
        PlatformError: It failed.
    """
    for tokens in _TOKENS:
        if len(prompt) + tokens > scale.spec.context_length:
            break
        found = _run(scale, prompt, tokens, arguments, snapshot, template)
        if found.memory.weights:
            return found
    raise PlatformError(
        "a rehearsal was over before its memory could be looked at",
        hint="Try again when the machine is less busy.",
    )


def _run(
    scale: ScaleModel,
    prompt: Sequence[int],
    tokens: int,
    arguments: Sequence[str],
    snapshot: Mapping[str, str],
    template: int | None,
) -> Rehearsed:
    command = ["run", scale.path, "--prompt-ids", ",".join(map(str, prompt)), "-n", str(tokens)]
    timeline = os.path.join(scale.path, "timeline.json")
    command += ["--ignore-eos", "--quiet", "--timeline", timeline, *arguments]
    idle_before_s = idle_s()
    with _process(command, snapshot, stdout=subprocess.PIPE) as (process, started_ns):
        # Both workers have computed when some tokens are out.
        read_until(process, _TOKENS[0] // 2, _PATIENCE_S)
        with held(process):
            passed_s = (time.monotonic_ns() - started_ns) / 1e9
            busy = busy_processors(process.pid, passed_s, idle_before_s, template)
            memory = footprint(process.pid, template)
        process.communicate(timeout=_PATIENCE_S)
        if process.returncode:
            raise PlatformError("a rehearsal failed", got=f"exit status {process.returncode}")
    document = json.loads(Path(timeline).read_bytes())
    worker = worker_of(document["stages"], document["ttft_s"])
    stream_s, streamed = _stream(scale, document, worker.up_s)
    return Rehearsed(replace(worker, busy=busy, stream_s=stream_s, streamed=streamed), memory)


def _stream(scale: ScaleModel, document: Mapping[str, Any], up_s: float) -> tuple[float, float]:
    """What a byte of the weights took of the processors, and how many had come at a moment.

    Weights that are mapped where they lie do not come.
    """
    load = document["load"]
    if load["mode"] != "copied" or load["processor_s"] is None:
        return 0.0, 0.0
    began = _first_byte_s(document["stages"])
    ends = [s["end_s"] for s in document["stages"] if s["name"].startswith("stage_ready[")]
    took = max(ends, default=began) - began
    part = (up_s - began) / took if took > 0 else 1.0
    return load["processor_s"] / scale.nbytes, scale.nbytes * min(1.0, max(0.0, part))


def rehearse_serve(
    scale: ScaleModel,
    prompt: Sequence[int],
    arguments: Sequence[str],
    snapshot: Mapping[str, str],
    free: Callable[[], int] | None = None,
    template: int | None = None,
) -> tuple[Rehearsed, Resting, int | None]:
    """One `coldframe serve`, asked while it starts, then warm, then parked; as `rehearse_run`.

    Args:
        free: Says how much of a GPU nobody has.

    Returns:
        The start, the rests, and what `free` said after the first answer.
    """
    port = free_port()
    command = ["serve", scale.path, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--platform", "generic", "--model-name", _MODEL, *arguments]
    idle_before_s = idle_s()
    with _process(command, snapshot, stdout=subprocess.DEVNULL) as (process, started_ns):
        connection = knock(port, process, _PATIENCE_S)
        try:
            ttft_s = (first_token_ns(connection, _MODEL, prompt, _TOKENS[0]) - started_ns) / 1e9
            passed_s = (time.monotonic_ns() - started_ns) / 1e9
            busy = busy_processors(process.pid, passed_s, idle_before_s, template)
            memory = footprint(process.pid, template)
            left = None if free is None else free()
            startup = ask(connection, "GET", "/startup")
            stages = startup["timeline"]["stages"]
            rests = {}
            for rest, path in _RESTS.items():
                if path is not None:
                    ask(connection, "POST", path)
                asked = time.monotonic_ns()
                # Another prompt each time: what is in KV already is not computed again.
                other = [1 + (token + len(rest)) % (scale.spec.vocab_size - 1) for token in prompt]
                rests[rest] = (first_token_ns(connection, _MODEL, other, _TOKENS[0]) - asked) / 1e9
        finally:
            connection.close()
    worker = replace(worker_of(stages, ttft_s), busy=busy)
    return Rehearsed(worker, memory), Resting(rests), left


def worker_of(stages: Sequence[Mapping[str, Any]], ttft_s: float) -> Worker:
    """The times of a start, from its timeline.

    Args:
        stages: The timeline's spans; see `Timeline.to_json`.
        ttft_s: When whoever asked had the first token.

    Raises:
        PlatformError: Something is missing in it.
    """
    try:
        # A replica whose gateway is up last has made a token for nobody before the client's.
        head = max((s for s in stages if s["name"] == "prefill[head]"), key=lambda s: s["end_s"])
        name = head["process"]
        mine = {s["name"]: s for s in stages if s["process"] == name}
        first_byte = _first_byte_s(stages)
        ready = mine["ready"]["end_s"]
        embedding = mine["prefill[embedding]"]
        arrived = min(
            (s["end_s"] for s in stages if s["name"] == "stage_ready[0]"), default=first_byte
        )
        # What passes between a worker that is up, with weights in, and its first piece of work.
        gap = max(0.0, embedding["start_s"] - max(ready, arrived))
        layers: list[float] = []
        while f"prefill[{len(layers)}]" in mine:
            layers.append(_length(mine[f"prefill[{len(layers)}]"]))
    except (KeyError, ValueError) as error:
        raise PlatformError(
            "a rehearsal's timeline has no such stage", got=repr(error), where="the scale model"
        ) from error
    further = layers[1:] or layers
    return Worker(
        first_byte_s=first_byte,
        up_s=ready + gap,
        embedding_s=_length(embedding),
        first_layer_s=layers[0],
        layer_s=sum(further) / len(further),
        head_s=_length(head),
        out_s=max(0.0, ttft_s - head["end_s"]),
    )


def _first_byte_s(stages: Sequence[Mapping[str, Any]]) -> float:
    for names in (("weight_read", "weight_fetch"), ("plan",), ("checkpoint_open",)):
        found = [s for s in stages if s["name"] in names and s["process"].startswith("memory")]
        if found:
            first = min(found, key=lambda s: s["start_s"])
            return float(first["start_s"] if names[0] == "weight_read" else first["end_s"])
    raise KeyError("weight_read")


def _length(stage: Mapping[str, Any]) -> float:
    return float(stage["end_s"] - stage["start_s"])


@contextmanager
def _process(
    command: list[str], environment: Mapping[str, str], *, stdout: int
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A `coldframe` of ours while the context lasts, and just before its exec."""
    with tempfile.TemporaryFile() as said:
        started = time.monotonic_ns()
        told = {**environment, "COLDFRAME_EXEC_NS": str(started)}
        process = start_process(command, told, stdout=stdout, stderr=said.fileno())
        try:
            yield process, started
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            raise PlatformError("a rehearsal broke off", got=repr(error)) from error
        except subprocess.TimeoutExpired as error:
            raise PlatformError(
                "a rehearsal did not end", expected=f"within {_PATIENCE_S:g} s"
            ) from error
        except PlatformError as error:
            said.seek(0)
            words = said.read()[-2000:].decode(errors="replace").strip().rstrip(".")
            raise PlatformError(
                error.what,
                where=error.where,
                expected=error.expected,
                got=f"{error.got}; it said: {words or 'nothing'}",
                hint=error.hint,
            ) from error
        finally:
            end_process(process)
