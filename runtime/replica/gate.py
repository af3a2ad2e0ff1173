"""Requests held back until clones have answered their image's own prompt."""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.frozen.oracle import OracleRun
from coldframe.runtime.replica.answers import Listener
from coldframe.runtime.replica.launch import WorkerProcess

__all__ = ["Gate"]


class Gate:
    """Open, or holding requests.

    Args:
        submit: Gives the workers a request past this gate: parameters, listener, prompt ids.
        distrust: Called where clones do not answer as they must.
    """

    def __init__(
        self,
        submit: Callable[[SamplingParams, Listener, tuple[int, ...]], str],
        distrust: Callable[[ColdframeError], None],
    ) -> None:
        self._submit = submit
        self._distrust = distrust
        self._held: dict[str, tuple[Callable[[], None], Listener]] | None = {}
        self._run: OracleRun | None = None

    @property
    def open(self) -> bool:
        return self._held is None

    def hold(self, request: str, go: Callable[[], None], listener: Listener) -> None:
        """Keeps a request back; `go` is called once its answer can be trusted."""
        assert self._held is not None
        self._held[request] = (go, listener)

    def cancel(self, request: str) -> None:
        """Forgets a request, where it is held."""
        if self._held is not None:
            self._held.pop(request, None)

    def fail(self, error: ColdframeError) -> None:
        """No request will be served."""
        while self._held:
            self._held.popitem()[1][1].on_error(error)

    def is_up(self, worker: WorkerProcess, vocab_size: int) -> None:
        """A worker can answer: if it is a clone, it is asked; one that started fresh is trusted."""
        if self.open or self._run is not None:
            return
        cloner = worker.cloner
        if cloner is None or cloner.tier != "image":
            self._open()
            return
        oracle = None if cloner.manifest is None else cloner.manifest["oracle"]
        if oracle is None:
            self._distrust(
                SnapshotError(
                    "the image does not say what its clones must answer",
                    where=cloner.image,
                    hint="Make it again: `coldframe snapshot create`.",
                )
            )
            return
        self._run = OracleRun(self._submit, vocab_size, oracle, self._answered)

    def _answered(self) -> None:
        assert self._run is not None
        if self._run.error is not None:
            self._distrust(self._run.error)
        self._open()

    def _open(self) -> None:
        held, self._held = self._held or {}, None
        for go, _ in held.values():
            go()
