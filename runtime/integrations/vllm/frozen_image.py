"""Images of a vLLM engine: made, tried and published.

The front's side: nothing here imports vLLM. It uses the same processes as our own workers' images
do, in the interpreter that has vLLM, with another line of Python to freeze and an `EngineKey` by
which neither kind is taken for the other. An image is tried as it will be used: by a replica of
which vLLM serves all.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE
from coldframe.loader.cgroup import cpu_count, memory_available
from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.loader.process import Child, make_run_dir, remove_run_dir, spawn_python
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.frozen.oracle import OracleRun
from coldframe.runtime.frozen.worker import room, weights_room
from coldframe.runtime.integrations.vllm.engine import engine_arguments, longest_sequence
from coldframe.runtime.integrations.vllm.environment import (
    ENGINE_ENVIRONMENT,
    SAMPLER_ENVIRONMENT,
    places_in,
)
from coldframe.runtime.integrations.vllm.frozen_key import asked_for, engine_variables
from coldframe.runtime.integrations.vllm.frozen_limits import check
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.snapshot.freezer import freezing_environment
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey

__all__ = ["EngineImage"]

_MAIN = "from coldframe.snapshot.freezer import main; main(3, int(sys.argv[1]), first_ns)"
_FREEZE = "from coldframe.runtime.integrations.vllm.frozen import main; main(3)"
_FREEZE_S = 600.0
_END_S = 10.0
_MOST_KV = 4 << 30
_KV_ARENA = 16 << 30
"""How much KV a replica may have of its own before a clone has to find other room for it."""


@dataclass(frozen=True, slots=True)
class EngineImage:
    """What an image is of.

    Args:
        model: The model's directory.
        vllm: The engine, as a replica has it.
        threads: How many threads it is warmed up with; None takes as many as there may be.
    """

    model: str
    vllm: VllmOptions
    threads: int | None = None

    def create(
        self, snapshot: SnapshotOptions, *, compress: str = "auto", name: str | None = None
    ) -> Manifest:
        """Freezes such an engine, has a clone answer, and publishes the image.

        Args:
            snapshot: The store, and the key to sign with.
            compress: See `Store.put`.
            name: The MODEL that it is found by, where that is another.

        Raises:
            SnapshotError: It cannot be frozen, or its clone does not answer; nothing is kept.
            ColdframeError: The model cannot be read, or a process cannot be started.
        """
        order = self._order(snapshot, compress, name or self.model)
        with _run_dir() as run_dir:
            order["work"] = os.path.join(run_dir, "freezer")
            order["environment"] |= places_in(run_dir, order["environment"])
            ours, theirs = Channel.pair()
            child = self._spawn(theirs)
            theirs.close()
            try:
                ours.send(order)
                staged = _said(ours, "staged")
                oracle = self._answer(replace(snapshot, manifest=staged["manifest"]), None)
                ours.send({"type": "publish", "oracle": oracle})
                published = _said(ours, "published")
            finally:
                # The end of its socket has it take away what it has stored.
                ours.close()
                _await_end(child)
        return Manifest.from_json(published["manifest"])

    def verify(self, snapshot: SnapshotOptions, image: Manifest) -> None:
        """Has a clone of an image answer the prompt that the image has the answer to.

        Raises:
            SnapshotError: It does not fit, answers something else, or there is no clone.
        """
        if image.oracle is None:
            raise SnapshotError(
                "the image does not say what its clones must answer", where=f"image {image.id}"
            )
        self._answer(replace(snapshot, image=image.id), image.oracle.to_json())

    def _answer(self, snapshot: SnapshotOptions, recorded: dict[str, Any] | None) -> dict[str, Any]:
        """What a clone answers to the oracle's prompt, in a replica that has nobody else.

        Raises:
            SnapshotError: There is no clone, or it answers something else than was recorded.
        """
        options = ReplicaOptions(
            self.model,
            prefill=0,
            decode=0,
            threads=self.threads,
            vllm=replace(self.vllm, alone=True),
            snapshot=replace(snapshot, mode="require"),
        )
        over: list[bool] = []
        with Replica(options) as replica:
            replica.run_until(lambda: replica.sized)
            run = OracleRun(
                lambda params, listener, ids: replica.submit(params, listener, prompt_ids=ids),
                replica.spec.vocab_size,
                recorded,
                lambda: over.append(True),
            )
            replica.run_until(lambda: bool(over))
        if run.error is not None:
            raise run.error
        return run.answer

    def _spawn(self, theirs: Channel) -> Child:
        own = self.vllm.python == sys.executable
        return spawn_python(
            *(_MAIN, [str(now())], theirs.fileno(), dict(os.environ)),
            site_packages=not own,  # another interpreter has packages of its own
            executable=self.vllm.python,
        )

    def _order(self, snapshot: SnapshotOptions, compress: str, name: str) -> dict[str, Any]:
        model = ModelFacts(self.model, vllm=True)
        spec, threads = model.spec, self.threads or cpu_count()
        kv_bytes = self.vllm.kv_bytes
        if kv_bytes is None:
            kv_bytes = min(_MOST_KV, memory_available() // 4)
        given = dict(self.vllm.args)
        arguments = engine_arguments(
            *(os.path.abspath(self.model), CPU, spec.dtype),
            longest_sequence(spec, kv_bytes),
            kv_bytes,
            given,
        )
        check(arguments)
        key = asked_for({**given, "max_model_len": arguments["max_model_len"]}, kv_bytes)
        weights = [WEIGHTS_BASE, weights_room(model)]
        kv = [KV_BASE, room(_KV_ARENA)]
        return {
            "type": "freeze",
            "code": _FREEZE,
            "order": {
                "type": "freeze",
                "arguments": arguments,
                "native": spec.native,
                "arenas": [weights[1], kv[1]],
            },
            "environment": {
                **freezing_environment(threads),
                **ENGINE_ENVIRONMENT,
                **engine_variables(),
                **SAMPLER_ENVIRONMENT,
            },
            "device": CPU,
            "name": name,
            "model": ModelKey.of(self.model, model.tensors).to_json(),
            "engine": key,
            "arena": {"weights": weights, "kv": kv},
            "store": snapshot.store,
            "key_file": snapshot.key_file,
            "compress": compress,
        }


@contextlib.contextmanager
def _run_dir() -> Iterator[str]:
    path, lock = make_run_dir()
    try:
        yield path
    finally:
        remove_run_dir(path)
        os.close(lock)


def _said(channel: Channel, kind: str) -> dict[str, Any]:
    """The next message, which is of that kind.

    Raises:
        ColdframeError: It is an error, or there is none.
    """
    try:
        message: Message | None = channel.recv(_FREEZE_S)
    except TimeoutError:
        raise SnapshotError(f"no {kind!r} came", expected=f"within {_FREEZE_S:g} s") from None
    if message is None:
        raise ReplicaError(
            "the process is gone", where=kind, hint="What it said is on standard error."
        )
    if message.kind != kind and "error" in message.body:
        raise ColdframeError.from_wire(message.body["error"])
    if message.kind != kind:
        raise SnapshotError("another message was expected", expected=kind, got=message.kind)
    return message.body


def _await_end(child: Child) -> None:
    late = time.monotonic() + _END_S
    while child.poll() is None and time.monotonic() < late:
        time.sleep(0.005)
    child.kill()
