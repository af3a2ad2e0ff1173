"""The process that restores clones of an image: started bare, privileged, and small.

It finds an image that fits this machine and model, copies it into memory of its own while hashing
it, and brings back a clone of it for each worker that the front asks for. What it mounts, nobody
else sees, and all of it is gone when it is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from coldframe.loader.errors import (
    ColdframeError,
    ImageDamaged,
    NoImage,
    PlatformError,
    SnapshotError,
)
from coldframe.loader.process import collect_garbage
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel
from coldframe.snapshot.choose import choose
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.init import Init
from coldframe.snapshot.linux import die_with_parent, mount_tmpfs, own_mounts
from coldframe.snapshot.machine import Machine, own_sources
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.restoring import begin, go_on
from coldframe.snapshot.service import CloneService
from coldframe.snapshot.signing import read_key
from coldframe.snapshot.store import Skipped, Store, open_store

__all__ = ["ImageSource", "main"]


class ImageSource:
    """Makes clones of an image of a store.

    Args:
        recorder: Gets the spans `snapshot_check` and `snapshot_read`.
        criu: The program; None says that there is none.
        why: Why there is none.
    """

    def __init__(
        self, recorder: Recorder, criu: Criu | None, why: ColdframeError | None = None
    ) -> None:
        self._recorder = recorder
        self._criu = criu
        self._why = why
        self._user: bool | None = None
        self._images = ""
        self._work = ""
        self._image: tuple[Store, Manifest, bool] | None = None
        self._in_memory = False
        self._asked_for: Callable[[], dict[str, int]] = dict
        self._begun: dict[str, Init] = {}

    def begin_early(self, asked_for: Callable[[], dict[str, int]]) -> None:
        """Has clones begun while their image is still being read.

        Args:
            asked_for: Gives the names and control sockets of those that `clone` will be called for.
        """
        self._asked_for = asked_for

    def prepare(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Finds an image that fits and has it in memory.

        Args:
            wanted: `store`, `name` and `directory` (the model; null where its files are not here),
                `manifest` (one that is not published yet, or null), `hash`
                (whether to check what is read), `key_file`, `work` (a directory for this process),
                `device` (`cpu` or `cuda`, whose images alone will do), `engine` (see
                `EngineKey.here`; null or not there for our own workers), `image` (the id of the
                only one that will do; null or not there for any), `sources` (`own_sources` of
                whoever clones are to talk to; null or not there where it is of this installation).
        """
        theirs = wanted.get("sources")
        if theirs is not None and theirs != own_sources():
            raise SnapshotError(
                "clones of this interpreter have another coldframe than who asks for them",
                where=sys.executable,
                expected=f"sources {theirs}",
                got=f"sources {own_sources()}",
                hint="Install the same one for both.",
            )
        if self._criu is None:
            raise self._why or SnapshotError("there is no CRIU to use")
        key_file = wanted["key_file"]
        store = open_store(wanted["store"], key=None if key_file is None else read_key(key_file))
        exclude: set[str] = set()
        failure: SnapshotError | None = None
        listed: tuple[Sequence[Manifest], Sequence[Skipped]] = (), ()
        started = now()
        if wanted["manifest"] is None:
            # Once, and before anything is mounted: the user namespace that this may take makes a
            # stranger's store of root's (see `_read`).
            listed = store.manifests()
        while True:
            try:
                manifest = self._choose(listed, wanted, exclude)
            except NoImage:
                if failure is None:
                    raise
                if isinstance(failure, ImageDamaged):
                    # Another one can be made; what else went wrong would befall that too.
                    raise NoImage(
                        "no image is whole",
                        where=wanted["store"],
                        got=f"{failure.what} in {failure.where}",
                    ) from None
                raise failure from None
            self._recorder.add("snapshot_check", started, note=f"image {manifest.id}")
            self._image = store, manifest, wanted["hash"]
            self._mount(wanted["work"])
            try:
                for name, control_fd in self._asked_for().items():
                    self._begun[name] = self._begin(name, control_fd)
                self._read()
            except ColdframeError as error:
                self._give_up()
                if wanted["manifest"] is not None or not isinstance(error, SnapshotError):
                    raise
                # Another one of this model may be whole.
                failure = failure or error
                exclude.add(manifest.id)
                started = now()
                continue
            return {"id": manifest.id, "manifest": manifest.to_json()}

    def clone(self, name: str, control_fd: int) -> Init:
        init = self._begun.pop(name, None) or self._begin(name, control_fd)
        if not self._in_memory:
            try:
                self._read()
            except BaseException:
                init.kill()
                self.gone(name)
                raise
        go_on(init)
        return init

    def _begin(self, name: str, control_fd: int) -> Init:
        assert self._criu is not None
        assert self._image is not None
        work = os.path.join(self._work, name)
        try:
            os.mkdir(work, 0o700)
        except OSError as error:
            raise PlatformError(
                "no room for a clone's files", where=work, got=error.strerror
            ) from error
        manifest = self._image[1]
        names = [file.name for file in manifest.files]
        user = bool(self._user)
        return begin(self._criu, manifest.process, self._images, names, work, control_fd, user=user)

    def _give_up(self) -> None:
        """Ends what was begun of an image that is no good."""
        for name, init in self._begun.items():
            init.kill()
            self.gone(name)
        self._begun.clear()

    def gone(self, name: str) -> None:
        import shutil  # only at the end: it is slow to import

        shutil.rmtree(os.path.join(self._work, name), ignore_errors=True)

    def rest(self) -> None:
        """Gives the image's memory back: the next clone has it read again."""
        if self._in_memory:
            self._in_memory = False
            self._empty()
            assert self._image is not None
            store, manifest, _ = self._image
            store.touch(manifest.id)

    def _choose(
        self,
        listed: tuple[Sequence[Manifest], Sequence[Skipped]],
        wanted: dict[str, Any],
        exclude: set[str],
    ) -> Manifest:
        if wanted["manifest"] is not None:
            return Manifest.from_json(wanted["manifest"])
        directory = wanted["directory"]
        engine = wanted.get("engine")
        manifests, skipped = listed
        if (only := wanted.get("image")) is not None:
            manifests = [manifest for manifest in manifests if manifest.id == only]
        choice = choose(
            manifests,
            Machine.here(device=wanted["device"]),
            model=None if directory is None else ModelKey.of(directory),
            name=wanted["name"],
            engine=None if engine is None else EngineKey.here(engine),
            exclude=frozenset(exclude),
        )
        if choice.manifest is None:
            reasons = [choice.why, *(f"{item.id}: {item.why}" for item in skipped)]
            raise NoImage("no image fits", where=wanted["store"], got="; ".join(reasons))
        return choice.manifest

    def _mount(self, parent: str) -> None:
        """Mounts memory that only this process and its clones see."""
        if self._user is not None:
            return
        user = own_mounts()
        self._work = os.path.join(parent, "clones")
        self._images = os.path.join(self._work, "image")
        try:
            os.makedirs(self._work, 0o700, exist_ok=True)
            mount_tmpfs(self._work)
            os.mkdir(self._images, 0o700)
        except OSError as error:
            raise PlatformError(
                "no room for an image", where=self._work, got=error.strerror
            ) from error
        self._user = user

    def _read(self) -> None:
        """Has the image in memory, each byte of it checked unless that is not wanted."""
        assert self._image is not None
        store, manifest, hashed = self._image
        started = now()
        self._empty()
        # In a user namespace root's files seem to be nobody's, so that a store of root's cannot be
        # told from a stranger's. The manifest was read outside of it, and has all hashes.
        alone = self._user is True
        direct = not hashed and "://" not in store.uri  # nothing else vouches for a network
        if direct and not alone:
            store.direct(manifest, self._images)
        elif not (direct and self._linked(store, manifest)):
            store.fetch(manifest, self._images, vouched=alone)
            hashed = True
        self._in_memory = True
        self._recorder.add("snapshot_read", started, note="hashed" if hashed else "not hashed")
        if "://" not in store.uri:  # over a network it is done when nobody waits
            store.touch(manifest.id)

    def _linked(self, store: Store, manifest: Manifest) -> bool:
        """Whether the image is there unchecked; not where it is not seen to be safe from others."""
        try:
            store.direct(manifest, self._images)
        except SnapshotError:
            return False
        return True

    def _empty(self) -> None:
        for name in os.listdir(self._images):
            os.unlink(os.path.join(self._images, name))


def main(control_fd: int, spawned_ns: int, first_ns: int) -> None:
    """The process's entry.

    Args:
        control_fd: The inherited end of the front's socket pair.
        spawned_ns: When the front started this process (CLOCK_MONOTONIC).
        first_ns: When its first line of Python ran.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    recorder = Recorder("snapshot")
    recorder.add("interpreter", spawned_ns, first_ns)
    recorder.add("imports", first_ns)
    why = None
    try:
        criu: Criu | None = Criu.find()
    except ColdframeError as error:
        criu, why = None, error
    source = ImageSource(recorder, criu, why)
    service = CloneService(Channel.from_fd(control_fd), source, recorder)
    source.begin_early(service.asked_for)
    collect_garbage()
    service.run()
