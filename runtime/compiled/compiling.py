"""Code for a model's decode steps, before an image is made: from the cache, or by a child process.

Compiling takes a minute or so of one core, once for a model's shape, this CPU and this torch. It is
done by a child at the lowest priority that the kernel kills before anybody else, one at a time, and
ends by itself when its time is over. Whatever comes of it, the image is made.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import tempfile
import time
from math import prod
from typing import Any

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import ColdframeError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.wire import Channel
from coldframe.runtime.compiled.folder import cache_root, cached, key_of, open_root
from coldframe.runtime.compiled.trial_plan import compile_bytes
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.units import human_bytes

__all__ = ["COMPILE_S", "SEQUENCES", "Compiling"]

SEQUENCES = (1, 2, 4)
"""Sequences of the steps that are compiled; from eight on a product is no faster so."""
COMPILE_S = 300
"""How long it may take, in seconds."""
LEAST_BYTES = 64 << 20
"""Of a model's weights: a step that reads less takes a few milliseconds in any case."""
_VERDICT_S = 24 * 3600
"""How long it is taken for granted that a step is no faster than eager."""
_MAIN = "from coldframe.runtime.compiled.compiler import main; main(3, int(sys.argv[1]))"


class Compiling:
    """Looks for a model's code, and has it compiled where it is not there.

    Args:
        model: The model.
        threads: That steps are computed with.
        work: A private directory, where the cache cannot be written.
        limit_s: How long it may take; with 0 there is only what is in the cache.
        again: Whether a step that was found to be no faster than eager is measured again.

    Attributes:
        done: Whether there is nothing to wait for (any more).
        order: What a worker that is to be frozen is told of it: `folder`, or None, and `why`.
    """

    def __init__(
        self, model: ModelFacts, threads: int, work: str, limit_s: int, *, again: bool = False
    ) -> None:
        self.done = False
        self.order: dict[str, Any] = {"folder": None, "why": ""}
        self._channel: Channel | None = None
        self._child: Child | None = None
        self._writing: str | None = None
        self._limit_s = limit_s
        self._since = time.time() - (0 if again else _VERDICT_S)
        try:
            shape = CodeShape.of_tensors(model.spec, model.tensors, threads)
            self._key = key_of(shape, SEQUENCES)
        except ColdframeError as error:
            self._end(str(error))
            return
        self._root = cache_root()
        if self._found():
            return
        why = self._why_not(model)
        if why is not None:
            self._end(why)
            return
        try:
            self._start(model, threads, work)
        except (OSError, ColdframeError) as error:
            self._end(f"nothing can be compiled here: {error}")

    def fileno(self) -> int:
        """Readable when there is something to `take`; only while it is not `done`."""
        assert self._channel is not None
        return self._channel.fileno()

    def take(self) -> None:
        """Takes what the child has said."""
        assert self._channel is not None
        messages, ended = self._channel.receive_ready()
        for message in messages:
            if message.kind == "failed":
                self._end(message.body["why"])
            elif not self._found():
                self._end("what was compiled cannot be read")
            return
        if ended:
            self._end(f"the compiler was ended, or took longer than {self._limit_s} s")

    def wait(self) -> dict[str, Any]:
        """Blocks until it is done: its `order`."""
        while not self.done:
            select.select([self], [], [])
            self.take()
        return self.order

    def close(self) -> None:
        """Gives it up where it is not done."""
        if not self.done:
            self._end("it was given up")

    def _found(self) -> bool:
        folder = cached(self._root, self._key, self._since)
        if folder is None:
            return False
        self._end(folder.note)
        if folder.sizes:
            self.order["folder"] = folder.path
        return True

    def _why_not(self, model: ModelFacts) -> str | None:
        nbytes = model.weights_bytes or sum(
            model.spec.dtype_bytes * prod(shape) for shape in model.spec.expected_tensors().values()
        )
        if nbytes < LEAST_BYTES:
            return f"not compiled: a model of {human_bytes(nbytes)} is fast enough"
        if not self._limit_s:
            return "not compiled: nobody waits for that here, `coldframe snapshot create` does"
        needed, free = compile_bytes(model.spec, max(SEQUENCES)), memory_available()
        if free < needed:
            return f"not compiled: that takes {human_bytes(needed)}, {human_bytes(free)} free"
        return None

    def _start(self, model: ModelFacts, threads: int, work: str) -> None:
        try:
            self._writing = _folder_in(self._root)
        except (OSError, ColdframeError):  # then it is for this image alone
            self._root = os.path.join(os.path.abspath(work), "compiled")
            self._writing = _folder_in(self._root)
        self._channel, theirs = Channel.pair()
        from coldframe.snapshot.freezer import freezing_environment  # what only looks does without

        environment = {
            # What is compiled is run: nothing else of the environment has a say in it.
            **freezing_environment(threads),
            **({"CXX": os.environ["CXX"]} if "CXX" in os.environ else {}),
            # All that torch and the compiler leave lies here, and is removed with it.
            "TMPDIR": self._writing,
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(self._writing, "inductor"),
        }
        try:
            self._child = spawn_python(_MAIN, [str(os.getpid())], theirs.fileno(), environment)
        finally:
            theirs.close()
        order = {
            "type": "compile",
            "directory": model.directory,
            "tensors": [[name, t.dtype, list(t.shape)] for name, t in model.tensors.items()],
            "threads": threads,
            "sequences": list(SEQUENCES),
            "root": self._root,
            "key": self._key,
            "writing": self._writing,
            "limit_s": self._limit_s,
            "since": self._since,
        }
        self._channel.send(order)

    def _end(self, why: str) -> None:
        self.done = True
        self.order["why"] = why
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._child is not None:
            # The compiler that it runs outlives it; the group has its number until it is reaped.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._child = None
        if self._writing is not None:
            shutil.rmtree(self._writing, ignore_errors=True)
            self._writing = None


def _folder_in(root: str) -> str:
    """A new folder in one that nobody else may write to.

    Raises:
        OSError: It cannot be made.
        SnapshotError: Others may.
    """
    if os.path.isabs(root):
        os.makedirs(root, 0o700, exist_ok=True)
    os.close(open_root(root))
    return tempfile.mkdtemp(prefix=".writing-", dir=root)
