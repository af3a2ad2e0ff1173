"""How a worker comes to be: a clone of an image, a fork of a resident template, or fresh.

The tiers are tried in that order. One that fails is not tried again by this replica: the worker
starts fresh, at once, and why is kept for the timeline. An engine that is not ours has ways of its
own: images of that engine, restored by the interpreter that has it, and no template.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from coldframe.loader.errors import ColdframeError, NoImage, ReplicaError
from coldframe.loader.timeline import clock_shift_ns, now
from coldframe.loader.wire import Channel
from coldframe.runtime.machine.device_choice import CPU, kind_of
from coldframe.runtime.options import SnapshotOptions
from coldframe.snapshot.cloner import CloneChild, Cloner
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.machine import own_sources
from coldframe.snapshot.manifest import EAGER_FOR_NOW
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import KEY_DIGITS, images_are_there, templates
from coldframe.snapshot.restorer_process import RestorerProcess
from coldframe.snapshot.wake import Wake

__all__ = ["Tiers"]

RESTORE_S = 5.0
"""How long a clone may take to be there, in seconds: longer than a worker that starts fresh."""
ENGINE_S = 15.0
"""And one of an engine that takes ten seconds and more."""
_WAKE_S = 10


class Tiers:
    """The ways to start a worker that a replica has left.

    Args:
        options: Which ones are wanted.
        model: The model's name, as it was given.
        directory: Where its files are, if they are here.
        run_dir: The replica's private directory.
        restorer: One that was started before it was known what it is for.
        user: Whom clones run as; None takes whoever this is.
        device: Where workers compute. On a GPU none is a fork: it would be without the context
            that its parent has; and no engine is a clone.
        engine: Whose workers, where they are not ours; see `EngineKey.here`.
        python: The interpreter that has that engine.

    Attributes:
        cloners: Those who make clones, the best first.
        no_image: Whether there is none that fits.
        failed: What is wrong with those that there are.
        why: Why there are no clones, or none any more: one reason for each tier that dropped out.
        restore_s: How long a clone may take to be there, in seconds.
    """

    def __init__(
        self,
        options: SnapshotOptions,
        model: str,
        directory: str | None,
        run_dir: str,
        restorer: RestorerProcess | None = None,
        user: Identity | None = None,
        device: str = CPU,
        engine: Mapping[str, Any] | None = None,
        python: str | None = None,
    ) -> None:
        self.options = options
        self.restore_s = RESTORE_S if engine is None else ENGINE_S
        self.directory = directory
        self.why: list[str] = []
        self.no_image = False
        self.failed: str | None = None
        self.cloners: list[Cloner] = []
        self._run_dir = run_dir
        self._user = user
        self._dropped: list[Cloner] = []
        on_gpu = device != CPU
        if options.mode == "off":
            self.why.append("snapshots are off")
        elif engine is not None and on_gpu:
            self.why.append(f"no image holds what an engine has on {device}")
        elif options.manifest is not None or images_are_there(options.store):
            self.cloners.append(Cloner.of(restorer or RestorerProcess(python)))
            restorer = None
        else:
            self.why.append(f"no image in {options.store}")
            self.no_image = True
        if restorer is not None:
            restorer.close()
        if options.mode != "off" and options.manifest is None and engine is None:
            for path in self._templates():
                if on_gpu:
                    self.why.append(f"template: a fork has nothing of a context on {device}")
                    break
                try:
                    self.cloners.append(Cloner.connect(path))
                except ColdframeError as error:
                    self.why.append(str(error))
        elsewhere = python is not None and python != sys.executable
        for cloner in self.cloners:
            cloner.prepare(
                {
                    "store": options.store,
                    "name": model,
                    "directory": directory,
                    "manifest": options.manifest,
                    "hash": options.hash,
                    "key_file": options.key_file,
                    "work": run_dir,
                    "device": kind_of(device),
                    "engine": engine,
                    "image": options.image,
                    "sources": own_sources() if elsewhere else None,
                }
            )

    @property
    def remote(self) -> bool:
        """Whether images come over a network."""
        return "://" in self.options.store

    @property
    def eager_for_now(self) -> bool:
        """Whether clones are of an image whose decode steps could be compiled, and are not."""
        best = self.best
        if best is None or best.tier != "image" or best.manifest is None:
            return False
        return str(best.manifest["decode_steps"]).startswith(EAGER_FOR_NOW)

    @property
    def best(self) -> Cloner | None:
        """Who makes the next clone; None where workers start fresh."""
        return next((cloner for cloner in self.cloners if cloner.error is None), None)

    def clone(
        self,
        cloner: Cloner,
        name: str,
        channels: tuple[Channel, Channel],
        threads: int,
        environment: dict[str, str],
    ) -> CloneChild:
        """Asks for a clone and tells it what this start is.

        Args:
            cloner: Who makes it.
            name: The worker's.
            channels: The front's end of its control socket, and its own, which is closed.
            threads: It computes with so many.
            environment: Its environment.
        """
        ours, theirs = channels
        child = cloner.clone(name, theirs.fileno())
        # An environment may be more than the socket holds, and then somebody has to be there to
        # read it; that there is nobody can only be seen without a reader of our own.
        theirs.close()
        ours.set_send_timeout(_WAKE_S)
        started_ns, identity = now() - clock_shift_ns(), self._user or Identity.current()
        wake = Wake.message(name, environment, threads, self._run_dir, started_ns, identity)
        with contextlib.suppress(ReplicaError):  # its end is told by whoever makes it
            ours.send(wake, [2])
        return child

    def drop(self, cloner: Cloner, error: ColdframeError) -> None:
        """No more clones from there."""
        if cloner not in self._dropped:
            self._dropped.append(cloner)
            self.no_image = self.no_image or isinstance(error, NoImage)
            if cloner.tier == "image":
                self.failed = str(error)
            self.why.append(f"{cloner.tier}: {error}")
            if not cloner.has_clones:  # it would only keep its memory and its rights
                cloner.end(error)
        cloner.error = cloner.error or error

    def _templates(self) -> list[str]:
        """The sockets of templates that may be of this model."""
        found = templates()
        if found and self.directory is not None:
            try:
                beginning = ModelKey.of(self.directory).digest[:KEY_DIGITS]
            except ColdframeError:  # which will be said where the model is loaded
                return []
            found = [path for path in found if os.path.basename(path).startswith(beginning)]
        return found

    def close(self) -> None:
        for cloner in self.cloners:
            cloner.close()
