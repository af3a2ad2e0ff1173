"""Making an image for a replica's model: frozen by a helper, tried by this replica, then published.

The helper process warms a worker up, freezes it and stores the image. Before anybody else can use
it, two clones of it join this replica and answer a short prompt on the real weights: prefill, the
hand-off and decode. What they say becomes the image's oracle.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE
from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel
from coldframe.runtime.compiled.compiling import Compiling
from coldframe.runtime.compiled.notes import could_be_compiled
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.frozen.oracle import OracleRun
from coldframe.runtime.frozen.worker import FREEZE, freeze_order, room, weights_room
from coldframe.runtime.machine.device_choice import CPU, kind_of
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.answers import Listener
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.workforce import ending
from coldframe.snapshot.freezer import freezing_environment
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.reach import check_reach

__all__ = ["Freezing", "Trial"]

_MAIN = "from coldframe.snapshot.freezer import main; main(3, int(sys.argv[1]), first_ns)"
_CLEAR_UP_S = 5.0
_COMPILING = "compiling the decode step, once for this shape and CPU (--graphs off skips it)"
_FREEZING = "freezing a worker"
FREEZE_S = 600.0
"""How long an image may take to be in its store, in seconds; that may be beyond a network."""


class Freezing:
    """An image in the making; it goes on while the replica is polled.

    Args:
        replica: Whose model; it is `sized`. Its memory service has the weights.
        snapshot: The store, and the key to sign with.
        compress: See `Store.put`.
        code: How long compiling its decode step may take, in seconds; None leaves it eager.
        only_compiled: Whether there is no use for an image whose decode step is not compiled.
        again: See `Compiling`.

    Attributes:
        done: Whether it has come to its end, one or the other.
        image: The id of the image, once it is published.
        error: Why there is none.
    """

    def __init__(
        self,
        replica: Replica,
        snapshot: SnapshotOptions,
        *,
        compress: str = "auto",
        code: int | None = None,
        only_compiled: bool = False,
        again: bool = False,
    ) -> None:
        self.done = False
        self.image: str | None = None
        self.manifest: dict[str, Any] | None = None
        self.error: ColdframeError | None = None
        self._replica = replica
        self.snapshot = snapshot
        self._trial: Trial | None = None
        self._staged = False
        self._device = replica.options.device_of("prefill")
        self._start = replica.run_dir
        self._code: Compiling | None = None
        order = self._ordered(compress)
        self._channel, theirs = Channel.pair()
        try:
            self._child: Child = spawn_python(
                _MAIN, [str(now())], theirs.fileno(), dict(os.environ), site_packages=False
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        replica.loop.watch(self._channel.fileno(), self._on_message)
        self._code = (
            None
            if code is None or self._device != CPU
            else Compiling(replica.model, replica.threads, replica.run_dir, code, again=again)
        )
        self._only_compiled = only_compiled
        self._order = order
        self._go_on()

    @property
    def compiling(self) -> bool:
        """Whether the model's decode step is compiled first, which takes its time."""
        return self._code is not None and not self._code.done

    def _go_on(self) -> None:
        """Has the worker frozen, as soon as there is the code that it is to have."""
        code = self._code
        if code is not None and not code.done:
            self._replica.loop.watch(code.fileno(), self._on_compiled)
            return
        if self._only_compiled and (code is None or code.order["folder"] is None):
            why = None if code is None else code.order["why"]
            self._end(SnapshotError("there is no better image than the one that is there", got=why))
            return
        worker = self._order["order"]
        if code is not None:
            told = {**code.order, "for_now": could_be_compiled(code.order)}
            worker = {**worker, "code": told}
        self._send_order({**self._order, "order": worker})

    def _on_compiled(self) -> None:
        assert self._code is not None
        fd = self._code.fileno()
        self._code.take()
        if self._code.done:
            self._replica.loop.unwatch(fd)
            self._go_on()

    def follow(
        self, limit_s: float | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Polls the replica until this is done, and gives it up where it hangs.

        Args:
            limit_s: After how many seconds, but for those that it compiles; None for `FREEZE_S`.
            tell: Called with what is done next, for people.

        Raises:
            ColdframeError: The replica cannot go on.
        """
        limit_s = FREEZE_S if limit_s is None else limit_s
        late = time.monotonic() + limit_s
        compiles = self.compiling
        tell(_COMPILING if compiles else _FREEZING)

        def done() -> bool:
            nonlocal late, compiles
            self.look()
            if compiles and not self.compiling:
                compiles, late = False, time.monotonic() + limit_s
                if not self.done:
                    tell(_FREEZING)
            if not self._staged and not compiles and time.monotonic() > late:
                self._end(SnapshotError("no image was made in time", expected=f"{limit_s:g} s"))
            return self.done

        try:
            self._replica.run_until(done)
        finally:
            self.close()

    def look(self) -> None:
        """Gives it up where the replica has started anew; to be called now and then."""
        if self._replica.run_dir != self._start:
            self._end(SnapshotError("the replica started anew while an image was made"))

    def close(self) -> None:
        """Gives it up where it is not done; nothing of it stays."""
        self._end(SnapshotError("it was given up"))

    def _ordered(self, compress: str) -> dict[str, Any]:
        replica, model, device = self._replica, self._replica.model, self._device
        weights = [WEIGHTS_BASE, weights_room(model)]
        kv = [KV_BASE, room(replica.kv_bytes or 0)]
        return {
            "type": "freeze",
            "code": FREEZE,
            "order": freeze_order(
                *(model, weights[1], kv[1], replica.threads, device), graphs=replica.options.graphs
            ),
            "environment": freezing_environment(replica.threads, device),
            "device": kind_of(device),
            "name": replica.options.model,
            "model": ModelKey.of(model.directory, model.tensors).to_json(),
            "arena": {"weights": weights, "kv": kv},
            "store": self.snapshot.store,
            "key_file": self.snapshot.key_file,
            "compress": compress,
            "work": os.path.join(replica.run_dir, "freezer"),
        }

    def _send_order(self, order: dict[str, Any]) -> None:
        """Has the worker made. One on a GPU only where its context can be kept: to find that out
        when it is warm would cost as much as what an image spares."""
        if self._device == CPU:
            self._send(order)
            return
        clones = self._replica.options.user or Identity.current()
        try:
            for helper in self._replica.memory_pids.values():
                check_reach(helper, clones)
        except ColdframeError as error:
            self._end(error)
            return

        def probed(body: dict[str, Any]) -> None:
            if body["error"] is None:
                self._send_with_memory(order)
            else:
                self._end(ColdframeError.from_wire(body["error"]))

        probe = {"type": "probe", "name": f"freezing-{self._child.pid}"}
        self._replica.order("prefill", probe, probed)

    def _send_with_memory(self, order: dict[str, Any]) -> None:
        """Sends it with a connection to the memory service of the worker's GPU."""
        if self.done:
            return
        try:
            memory = self._replica.connect_memory(self._device)
        except ReplicaError as error:
            self._end(error)
            return
        self._send(order, [memory.fileno()])
        memory.close()

    def _on_message(self) -> None:
        messages, ended = self._channel.receive_ready()
        for message in messages:
            self._replica.add_spans(message.body["spans"])
            match message.kind:
                case "checkpoint":
                    self._checkpoint(message.body["pid"], message.body["own_bytes"])
                case "staged":
                    self._staged = True
                    self._try(message.body["manifest"])
                case "published":
                    self.image, self.manifest = message.body["id"], message.body["manifest"]
                    self._end(None)
                case "failed":
                    self._end(ColdframeError.from_wire(message.body["error"]))
        if ended and not self.done:
            self._end(
                SnapshotError(
                    "the process that freezes is gone",
                    got=ending(self._child.kill()),
                    hint="What it said, if anything, is on standard error.",
                )
            )

    def _checkpoint(self, pid: int, own_bytes: int) -> None:
        """Has the worker's context leave the GPU, by whoever has one of its own there."""

        def done(body: dict[str, Any]) -> None:
            if not self.done:
                self._send(body)

        order = {"type": "checkpoint", "name": f"freezing-{pid}", "pid": pid}
        order["own_bytes"] = own_bytes
        self._replica.order("prefill", order, done)

    def _try(self, manifest: dict[str, Any]) -> None:
        snapshot = replace(self.snapshot, mode="require", manifest=manifest)
        try:
            self._trial = Trial(self._replica, snapshot, None, self._tried)
        except ColdframeError as error:
            self._end(error)

    def _tried(self, trial: Trial) -> None:
        if trial.error is not None:
            self._end(trial.error)
        else:
            self._send({"type": "publish", "oracle": trial.answer})

    def _send(self, body: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            self._channel.send(body, fds)
        except ReplicaError as error:
            self._end(error)

    def _end(self, error: ColdframeError | None) -> None:
        if self.done:
            return
        self.done, self.error = True, error
        if self._trial is not None:
            self._trial.close()
        if self._code is not None and not self._code.done:
            self._replica.loop.unwatch(self._code.fileno())
            self._code.close()
        self._replica.loop.unwatch(self._channel.fileno())
        self._channel.close()
        # The end of its socket has it take away what it has stored, and that shall be done.
        late = time.monotonic() + (_CLEAR_UP_S if self._staged else 0.0)
        while self._child.poll() is None and time.monotonic() < late:
            time.sleep(0.005)
        self._child.kill()


class Trial:
    """Clones of one image that answer the oracle's prompt beside a replica's other workers.

    Args:
        replica: It has the weights.
        snapshot: The image, as its `manifest`.
        recorded: What they have to answer; None where this is the first answer.
        then: Called with this when there is an answer, or an error.

    Attributes:
        error: Why there is no answer, or how it differs from the recorded one.
        answer: See `OracleRun`.
    """

    def __init__(
        self,
        replica: Replica,
        snapshot: SnapshotOptions,
        recorded: dict[str, Any] | None,
        then: Callable[[Trial], None],
    ) -> None:
        self.error: ColdframeError | None = None
        self.answer: dict[str, Any] = {}
        self._replica = replica
        self._then = then
        self._closed = False
        self._group = f"trial-{os.urandom(4).hex()}"
        try:
            replica.add_clones(snapshot, self._group, self._finish)
            vocab_size = replica.spec.vocab_size
            self._run = OracleRun(self._submit, vocab_size, recorded, self._answered)
        except BaseException:
            replica.remove_clones(self._group)
            raise

    def close(self) -> None:
        """Ends the clones."""
        if not self._closed:
            self._closed = True
            self._replica.cancel(self._run.request)
            self._replica.remove_clones(self._group)

    def _submit(self, params: SamplingParams, listener: Listener, ids: tuple[int, ...]) -> str:
        return self._replica.submit(params, listener, prompt_ids=ids, group=self._group)

    def _answered(self) -> None:
        self._finish(self._run.error)

    def _finish(self, error: ColdframeError | None) -> None:
        if not self._closed:
            self.error, self.answer = error, self._run.answer
            self.close()
            self._then(self)
