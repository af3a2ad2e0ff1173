"""What a clone does before anything else: it becomes the process of this start.

A restored worker is the creator's process to the bit, in the creator's moment. The hooks give it
the standard error, the environment, the clock, the user, the threads and the randomness of the
start that asked for it. Clocks themselves need no hook: they are read from the kernel, and their
offset is measured at the handshake, as CRIU restores into a time namespace of its own. What a
process inherits from its parent comes from the front too (see `inherited.py`).

Hooks of others run after the built-in ones. A package names them as entry points of the group
`coldframe.snapshot_hooks`, each a callable that takes a `Wake`:

    [project.entry-points."coldframe.snapshot_hooks"]
    reconnect = "my_package.pool:reconnect"

They are looked up and imported when the image is made, so they cost a start nothing but their own
run. They run in every clone, with the rights of the replica's user. A hook that raises ends the
clone, and the worker starts fresh instead.

Not changed: what libraries have read from the environment when they were imported; the locale; the
hash seed (see `entropy.py`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.snapshot.entropy import Generators
from coldframe.snapshot.privileges import become, drop
from coldframe.snapshot.wake import Ran, Wake
from coldframe.snapshot.xstate import ask_for, granted

__all__ = ["ENTRY_POINTS", "Hook", "Hooks"]

ENTRY_POINTS = "coldframe.snapshot_hooks"
"""The group of entry points that other packages register hooks in."""

Hook = Callable[[Wake], None]


class Hooks:
    """Hooks in the order in which they run."""

    def __init__(self) -> None:
        self._hooks: dict[str, Hook] = {}

    @classmethod
    def standard(cls, *, on_gpu: bool = False) -> Hooks:
        """The built-in hooks, then those that installed packages register.

        To be called just before the freeze: the generators of random numbers are those found now,
        and log files are closed here, to be opened again in each clone.

        Args:
            on_gpu: Whether clones have threads of a driver's, and `narrow` was called before them.

        Raises:
            SnapshotError: A registered hook cannot be imported, or has a name that is taken.
        """
        hooks = cls()
        generators = Generators()
        log_files = _close_log_files()
        registers = granted()
        hooks.register("stderr", _stderr)
        hooks.register("environment", _environment)
        hooks.register("clock", _clock)
        hooks.register("inherited", lambda wake: wake.inherited.take())
        hooks.register("identity", _identity_with_threads if on_gpu else _identity)
        hooks.register("registers", lambda _: ask_for(registers))
        hooks.register("threads", _threads)
        hooks.register("random", lambda _: generators.reseed())
        hooks.register("uuid", _uuid)
        hooks.register("tempfile", _tempfile)
        hooks.register("logging", lambda _: _open_log_files(log_files))
        hooks.load_entry_points()
        return hooks

    def register(self, name: str, hook: Hook) -> None:
        """Adds a hook behind those that are there.

        Raises:
            SnapshotError: There is one of that name.
        """
        if name in self._hooks:
            raise SnapshotError(
                "two hooks have the same name",
                where=name,
                got=f"{self._hooks[name]!r} and {hook!r}",
                hint="Rename one of them.",
            )
        self._hooks[name] = hook

    def load_entry_points(self) -> None:
        """Adds the hooks of installed packages, in the order of their names."""
        from importlib.metadata import entry_points  # slow to import, and wanted only here

        for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
            try:
                hook = entry.load()
            except Exception as error:  # whatever a package raises when it is imported
                raise SnapshotError(
                    "a hook cannot be imported",
                    where=f"entry point {entry.name} = {entry.value}",
                    got=repr(error),
                    hint="Mend or uninstall the package that registers it.",
                ) from error
            self.register(entry.name, hook)

    def run(self, wake: Wake) -> tuple[Ran, ...]:
        """Runs all of them.

        Returns:
            When each ran.

        Raises:
            SnapshotError: One raised. The process is half this start's and half the creator's,
                and must end.
        """
        ran = []
        for name, hook in self._hooks.items():
            started = monotonic_ns()
            try:
                hook(wake)
            except Exception as error:  # anybody's code
                raise SnapshotError(
                    "a hook failed after the restore",
                    where=name,
                    got=str(error) if isinstance(error, ColdframeError) else repr(error),
                    hint="The worker starts fresh instead. Make the image again if it stays so.",
                ) from error
            ran.append(Ran(name, started, monotonic_ns()))
        return tuple(ran)


def _loaded(module: str) -> Any:
    """A module where something has imported it: what is not there needs no mending."""
    return sys.modules.get(module)


def _stderr(wake: Wake) -> None:
    """Standard error and output go where this start's go."""
    if wake.stderr is None:
        return
    os.dup2(wake.stderr, 1)
    os.dup2(wake.stderr, 2)
    if wake.stderr > 2:
        os.close(wake.stderr)


def _environment(wake: Wake) -> None:
    """All of it is replaced, for libc too: nothing of the creator's shines through."""
    os.environ.clear()
    os.environ.update(wake.environment)


def _clock(wake: Wake) -> None:
    """The time zone of the new environment; log records count from the restore."""
    time.tzset()
    logging = _loaded("logging")
    if logging is not None:
        logging._startTime = time.time()


def _identity(wake: Wake) -> None:
    if wake.identity is not None:
        drop(wake.identity)


def _identity_with_threads(wake: Wake) -> None:
    """Where the process has threads of a driver's: libc has all of them change their user."""
    if wake.identity is not None:
        become(wake.identity, narrowed=True)


def _threads(wake: Wake) -> None:
    """As many threads as this container may use. The pool is made anew by its first use."""
    torch = _loaded("torch")
    # Besides OpenMP's it sets, and starts, a pool of threads that only mobile backends use.
    if torch is not None and torch.get_num_threads() != wake.threads:
        torch.set_num_threads(wake.threads)


def _uuid(wake: Wake) -> None:
    """`uuid1` must not tell clones apart by the hardware address, which they share.

    A random node id with the multicast bit is what RFC 9562, section 6.10, has for this. libuuid
    keeps a clock sequence of its own that cannot be reached, so it is not asked any more.
    """
    uuid = _loaded("uuid")
    if uuid is not None:
        uuid._node = int.from_bytes(os.urandom(6), "big") | 1 << 40
        uuid._last_timestamp = None
        uuid._generate_time_safe = None


def _tempfile(wake: Wake) -> None:
    """The temporary directory depends on the environment, and names in it on random numbers."""
    tempfile = _loaded("tempfile")
    if tempfile is not None:
        tempfile.tempdir = None
        tempfile._name_sequence = None


def _close_log_files() -> list[Any]:
    """Closes the files of all log handlers; returns the handlers."""
    logging = _loaded("logging")
    if logging is None:
        return []
    handlers = [handler for reference in logging._handlerList if (handler := reference())]
    found = []
    for handler in handlers:
        handler.flush()
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            handler.stream.close()
            handler.stream = None
            # Clones share the file: none may cut off what another has written.
            handler.mode = handler.mode.replace("w", "a")
            found.append(handler)
    return found


def _open_log_files(handlers: list[Any]) -> None:
    for handler in handlers:
        handler.stream = handler._open()
