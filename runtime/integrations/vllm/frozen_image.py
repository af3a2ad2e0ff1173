"""Images of a vLLM engine: made, tried and published; and clones of them.

The front's side: nothing here imports vLLM. It uses the same processes as our own workers' images
do, the freezer and the restorer, with another line of Python to freeze and an `EngineKey` by which
neither kind is taken for the other.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE
from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.loader.process import make_run_dir, remove_run_dir, spawn_python
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.frozen_worker import room
from coldframe.runtime.integrations.vllm.environment import ENGINE_ENVIRONMENT
from coldframe.runtime.integrations.vllm.frozen import FREEZE
from coldframe.runtime.integrations.vllm.frozen_limits import engine_arguments
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.oracle import compare, prompt_for
from coldframe.runtime.router import TokenEvent
from coldframe.snapshot.cloner import CloneChild, Cloner
from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.freezer import freezing_environment
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.wake import Wake

__all__ = ["EngineClone", "EngineImage", "cloner_of"]

PACKAGES = ("vllm", "transformers", "tokenizers")

_MAIN = "from coldframe.snapshot.freezer import main; main(3, int(sys.argv[1]), first_ns)"
_FREEZE_S = 600.0
_RESTORE_S = 60.0
_ANSWER_S = 300.0
_TOKENS = 8


@dataclass(frozen=True, slots=True)
class EngineImage:
    """What an image is of.

    Args:
        model: The MODEL, as it was written; a local directory.
        arguments: Of vLLM's `EngineArgs`, besides those that there are by default.
        threads: How many threads it is warmed up with.
    """

    model: str
    arguments: Mapping[str, Any]
    threads: int

    @property
    def key(self) -> EngineKey:
        """Of what an image of it is of.

        Raises:
            SnapshotError: Such an engine cannot be frozen; it says why.
            PlatformError: vLLM is not installed for this interpreter.
        """
        return EngineKey.of("vllm", PACKAGES, engine_arguments(self.arguments))

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
        key = self.key
        with _run_dir() as run_dir:
            ours, theirs = Channel.pair()
            child = spawn_python(
                _MAIN, [str(now())], theirs.fileno(), dict(os.environ), site_packages=False
            )
            theirs.close()
            try:
                ours.send(self._order(snapshot, key, compress, name or self.model, run_dir))
                staged = _said(ours, "staged", _FREEZE_S)
                oracle = self._try(snapshot, staged["manifest"], run_dir)
                ours.send({"type": "publish", "oracle": oracle})
                published = _said(ours, "published", _FREEZE_S)
            finally:
                # The end of its socket has it take away what it has stored.
                ours.close()
                _await_end(child)
        return Manifest.from_json(published["manifest"])

    def verify(self, snapshot: SnapshotOptions, image: Manifest) -> None:
        """Has a clone of an image answer the prompt that the image has the answer to.

        Raises:
            SnapshotError: It answers something else, or there is no clone.
        """
        if image.oracle is None:
            raise SnapshotError(
                "the image does not say what its clones must answer", where=f"image {image.id}"
            )
        recorded = image.oracle.to_json()
        with _run_dir() as run_dir, self._clone(snapshot, image.to_json(), run_dir) as clone:
            clone.load("auto")
            said = clone.ask(recorded["prompt_ids"], len(recorded["token_ids"]))
        answer = zip(said["token_ids"], said["logprobs"], strict=True)
        events = [
            TokenEvent(index, token, "", None, logprob, ((token, logprob),))
            for index, (token, logprob) in enumerate(answer)
        ]
        error = compare(recorded, events)
        if error is not None:
            raise error

    def _try(
        self, snapshot: SnapshotOptions, manifest: dict[str, Any], run_dir: str
    ) -> dict[str, Any]:
        """What a clone answers with the weights that vLLM itself loads."""
        vocabulary = _vocabulary(self.model)
        prompt = list(prompt_for(vocabulary))
        with self._clone(snapshot, manifest, run_dir) as clone:
            clone.load("auto")
            said = clone.ask(prompt, _TOKENS)
        return {
            "prompt_ids": prompt,
            "token_ids": said["token_ids"],
            "logprobs": said["logprobs"],
        }

    @contextlib.contextmanager
    def _clone(
        self, snapshot: SnapshotOptions, manifest: dict[str, Any], run_dir: str
    ) -> Iterator[EngineClone]:
        with cloner_of(self, snapshot, run_dir, manifest=manifest) as cloner:
            clone = EngineClone(cloner, "trial", self.threads, run_dir)
            try:
                yield clone
            finally:
                clone.close()

    def _order(
        self, snapshot: SnapshotOptions, key: EngineKey, compress: str, name: str, run_dir: str
    ) -> dict[str, Any]:
        arguments = engine_arguments(self.arguments)
        tensors = Checkpoint.open(self.model).tensors
        weights = room(sum(tensor.nbytes for tensor in tensors.values()))
        kv = room(arguments["kv_cache_memory_bytes"])
        return {
            "type": "freeze",
            "code": FREEZE,
            "order": {
                "type": "freeze",
                "model": os.path.abspath(self.model),
                "arguments": arguments,
                "arenas": [weights, kv],
            },
            "environment": {**freezing_environment(self.threads), **ENGINE_ENVIRONMENT},
            "device": "cpu",
            "name": name,
            "model": ModelKey.of(self.model, tensors).to_json(),
            "engine": key.to_json(),
            "arena": {"weights": [WEIGHTS_BASE, weights], "kv": [KV_BASE, kv]},
            "store": snapshot.store,
            "key_file": snapshot.key_file,
            "compress": compress,
            "work": os.path.join(run_dir, "freezer"),
        }


class EngineClone:
    """A clone of an engine: first without weights.

    Args:
        cloner: Who makes it; see `cloner_of`.
        name: Its name in log and timeline.
        threads: How many threads it computes with.
        run_dir: The replica's run directory.
        environment: Its environment besides `ENGINE_ENVIRONMENT`.
        identity: Whose process it becomes.
        stderr: A descriptor for its standard error; by default this process's.

    Attributes:
        woken: What it has said when it was there: `hooks`, the seconds that each took.
        ready_s: After how many seconds from the call that was.

    Raises:
        SnapshotError: There is no image that fits, or no clone comes of it.
    """

    def __init__(
        self,
        cloner: Cloner,
        name: str,
        threads: int,
        run_dir: str,
        *,
        environment: Mapping[str, str] | None = None,
        identity: Identity | None = None,
        stderr: int = 2,
    ) -> None:
        started = now()
        self._cloner = cloner
        self._channel, theirs = Channel.pair()
        self.child: CloneChild = cloner.clone(name, theirs.fileno())
        theirs.close()
        try:
            path = {"PATH": os.environ.get("PATH", os.defpath)}
            env = {**path, **ENGINE_ENVIRONMENT, **(environment or {})}
            wake = Wake.message(name, env, threads, run_dir, started, identity)
            self._await_restore()
            self._channel.send(wake, [stderr])
            self.woken = self._said("woken", _RESTORE_S)
        except BaseException:
            self.close()
            raise
        self.ready_s = (now() - started) / 1e9

    def load(
        self,
        load_format: str,
        extra: Mapping[str, object] | None = None,
        memory: Channel | None = None,
    ) -> float:
        """Has it load its weights.

        Args:
            load_format: The name of a loader of vLLM's.
            extra: Its `model_loader_extra_config`.
            memory: A connection to a memory service, which the loader then takes.

        Returns:
            How many seconds that took.

        Raises:
            ColdframeError: It could not.
        """
        fds = [] if memory is None else [memory.fileno()]
        body = {"type": "load", "load_format": load_format, "extra": dict(extra or {})}
        self._channel.send(body, fds)
        return float(self._said("loaded", _ANSWER_S)["seconds"])

    def ask(self, prompt_ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """What it answers, greedily and beyond the end of its text.

        Returns:
            `token_ids`, their `logprobs`, and `seconds`.

        Raises:
            ColdframeError: It has no answer.
        """
        order = {"type": "ask", "prompt_ids": list(prompt_ids), "max_tokens": max_tokens}
        self._channel.send(order)
        return self._said("answered", _ANSWER_S)

    def close(self) -> None:
        """Ends it."""
        self._channel.close()
        if not self.child.failed and self._cloner.error is None:
            self.child.kill()

    def _await_restore(self) -> None:
        """Until CRIU has done its part, or has not."""
        late = time.monotonic() + _RESTORE_S
        while not self.child.pid:
            while self._cloner.events:
                event = self._cloner.events.popleft()
                if event.error is not None:
                    raise event.error
            if self._cloner.error is not None:
                raise self._cloner.error
            if time.monotonic() > late:
                raise SnapshotError("a clone was not there in time", expected=f"{_RESTORE_S:g} s")
            self._cloner.receive(0.05)

    def _said(self, kind: str, wait_s: float) -> dict[str, Any]:
        return _said(self._channel, kind, wait_s)


@contextlib.contextmanager
def cloner_of(
    engine: EngineImage,
    snapshot: SnapshotOptions,
    run_dir: str,
    *,
    manifest: dict[str, Any] | None = None,
) -> Iterator[Cloner]:
    """A process that makes clones of an engine; they end with it.

    Args:
        engine: Of which.
        snapshot: The store, and how its images are read.
        run_dir: A directory for it.
        manifest: An image that is not published yet, to be used and no other.

    Raises:
        ColdframeError: Such an engine cannot be frozen, or the process cannot be started.
    """
    wanted = {
        "store": snapshot.store,
        "name": engine.model,
        "directory": engine.model,
        "manifest": manifest,
        "hash": snapshot.hash,
        "key_file": snapshot.key_file,
        "work": run_dir,
        "device": "cpu",
        "engine": engine.key.to_json(),
    }
    cloner = Cloner.spawn_restorer()
    try:
        cloner.prepare(wanted)
        yield cloner
    finally:
        cloner.close()


@contextlib.contextmanager
def _run_dir() -> Iterator[str]:
    path, lock = make_run_dir()
    try:
        yield path
    finally:
        remove_run_dir(path)
        os.close(lock)


def _said(channel: Channel, kind: str, wait_s: float) -> dict[str, Any]:
    """The next message, which is of that kind.

    Raises:
        ColdframeError: It is an error, or there is none.
    """
    try:
        message: Message | None = channel.recv(wait_s)
    except TimeoutError:
        raise SnapshotError(f"no {kind!r} came", expected=f"within {wait_s:g} s") from None
    if message is None:
        raise ReplicaError(
            "the process is gone", where=kind, hint="What it said is on standard error."
        )
    if message.kind != kind and "error" in message.body:
        raise ColdframeError.from_wire(message.body["error"])
    if message.kind != kind:
        raise SnapshotError("another message was expected", expected=kind, got=message.kind)
    return message.body


def _await_end(child: Any) -> None:
    late = time.monotonic() + 10.0
    while child.poll() is None and time.monotonic() < late:
        time.sleep(0.005)
    child.kill()


def _vocabulary(model: str) -> int:
    from coldframe.loader.checkpoint import read_config

    config = read_config(model)
    text = config.get("text_config") or config
    return int(text["vocab_size"])
