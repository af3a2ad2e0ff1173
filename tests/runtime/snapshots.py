"""Commands that use images, what they leave behind, and ways to spoil an image."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot import signing
from coldframe.snapshot.manifest import Manifest
from tests.runtime.helpers import prompt_of
from tests.support import without_settings

COLDFRAME = str(Path(sys.executable).parent / "coldframe")
PROMPT = prompt_of(40)
PROMPT_IDS = ",".join(map(str, PROMPT))

HOOK = """
import os, time

def hook(wake):
    if os.environ.get("WITNESS_RAISES"):
        raise ValueError("this hook does not like it here")
    time.sleep(float(os.environ.get("WITNESS_SLEEPS", "0")))
    path = os.environ.get("WITNESS")
    if path:
        with open(f"{path}-{wake.name}", "w") as file:
            file.write("\\n".join(f"{name}={value}" for name, value in os.environ.items()))
"""
"""A hook of another package: it says what environment a clone has, or raises, or takes long."""


class Made(NamedTuple):
    """An image in a store, made once."""

    model: Path
    store: Path
    image: str

    def copy(self, store: Path) -> Made:
        """The same in a store of its own, which may be spoilt."""
        shutil.copytree(self.store, store)
        return self._replace(store=store)


class Commands:
    """Calls `coldframe` with an environment of its own.

    Args:
        runs: Where run directories are made.
        cache: The user's cache.
    """

    def __init__(self, runs: Path, cache: Path) -> None:
        self.runs = runs
        self._cache = cache

    def environment(self, **more: str) -> dict[str, str]:
        clean = without_settings()
        mine = {"COLDFRAME_RUN_DIR": str(self.runs), "XDG_CACHE_HOME": str(self._cache)}
        return {**clean, **mine, **more}

    def start(self, *arguments: object, under: Sequence[str] = (), **env: str) -> Any:
        """Starts a command, with both outputs in pipes."""
        return subprocess.Popen(
            [*under, COLDFRAME, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(**env),
        )

    def call(
        self, *arguments: object, code: int = 0, under: Sequence[str] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, which is that exit status."""
        with self.start(*arguments, under=under, **env) as process:
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == code, f"{process.returncode}: {out}{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *arguments: object, **given: Any) -> dict[str, Any]:
        """What a command prints as JSON, and nothing else."""
        done = self.call(*arguments, "--json", **given)
        assert done.stdout.count("\n") == 1, done.stdout
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def run(self, made: Made, *arguments: object, **given: Any) -> dict[str, Any]:
        """`coldframe run` with the usual prompt; makes no image where the arguments do not ask."""
        what = ("--prompt-ids", PROMPT_IDS, "-n", 4, "--ignore-eos", "--no-snapshot-create")
        return self.json("run", made.model, *what, "--snapshot", made.store, *arguments, **given)


def left_behind(runs: Path) -> list[str]:
    """Processes, wherever they are by now, that were started to run there."""
    mark, found = f"COLDFRAME_RUN_DIR={runs}".encode(), []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ")
                found.append(f"{entry.name} {command.decode()[:200]}")
        except OSError:  # it has ended
            continue
    return found


def eventually(done: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


# -- templates ----------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    code = "import sys; from coldframe.runtime.cli import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, *arguments]


@contextmanager
def place() -> Iterator[str]:
    """A folder for run directories and sockets; its path is short, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="cf-") as runs:
        patch.setenv("COLDFRAME_RUN_DIR", runs)
        yield runs
        assert os.listdir(runs) == []


@contextmanager
def resident(model: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    """A template, and what it says when it is ready."""
    asked = command("snapshot", "template", str(model), "--json", *more)
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "there is no template; why is on standard error"
            yield process, json.loads(line)
        finally:
            process.terminate()
            assert process.wait(20) in (128 + signal.SIGTERM, 1)


# -- in the test's own process -------------------------------------------------------------------


def options(made: Made, runs: Path, mode: str = "auto", **more: Any) -> ReplicaOptions:
    """A replica that restores."""
    snapshot = SnapshotOptions(mode, str(made.store), **more.pop("snapshot", {}))
    return ReplicaOptions(str(made.model), run_dir=str(runs), snapshot=snapshot, **more)


def tier(replica: Replica) -> str:
    return str(replica.facts["snapshot"]["tier"])


def pid(replica: Replica, role: str) -> int:
    """The process of the one worker of a role, once there is one."""
    found = [pid for name, pid in replica.pids.items() if name.startswith(role) and pid]
    return found[0] if found else 0


# -- images spoilt -------------------------------------------------------------------------------


def manifest_of(made: Made) -> dict[str, Any]:
    (path,) = (made.store / "manifests").iterdir()
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def edited(
    made: Made, change: Callable[[dict[str, Any]], object], *, key: bytes | None = None
) -> Made:
    """The image with another manifest, filed under the id that it has now."""
    (path,) = (made.store / "manifests").iterdir()
    document = json.loads(path.read_bytes())
    change(document)
    manifest = Manifest.from_json(document)
    if key is not None:
        manifest = signing.sign(manifest, key)
    path.unlink()
    path = path.with_name(f"{manifest.id}.json")
    path.write_bytes(manifest.encode())
    path.chmod(0o600)
    return made._replace(image=manifest.id)


def objects(made: Made) -> list[Path]:
    """What the image consists of: the small files, then the pages."""
    return sorted((made.store / "objects").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path, at: int) -> None:
    """Changes one bit."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def program(path: Path, text: str) -> str:
    """A shell script that can be run: its path."""
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def install_hook(folder: Path) -> Path:
    """Another package with a hook, as pip would leave it."""
    info = folder / "witness-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[coldframe.snapshot_hooks]\nwitness = witness:hook\n")
    (folder / "witness.py").write_text(HOOK)
    return folder


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
