from __future__ import annotations

import mmap
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.errors import ColdframeError, PlatformError, SnapshotError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.dumping import freeze
from coldframe.snapshot.freezer import ALLOWED, freezing_environment
from coldframe.snapshot.store import open_store
from tests.snapshot.tiny import (
    CODE,
    ENVIRONMENT,
    Image,
    ask,
    ask_for,
    descriptors,
    event,
    frozen,
    gone,
    mounts,
    running,
    until,
    wanted,
)

MAIN = "from coldframe.snapshot.freezer import main; main(3, int(sys.argv[1]), first_ns)"


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    children = psutil.Process().children(recursive=True)
    before, fds = mounts(tmp_path), descriptors()
    yield
    assert mounts(tmp_path) == before
    assert descriptors() <= fds  # what others left may have been collected meanwhile
    assert psutil.Process().children(recursive=True) == children


def holds(directory: str | Path, text: str) -> bool:
    """Whether any file of an image has a text in it."""
    found = False
    for path in Path(directory).iterdir():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            found = found or data.find(text.encode()) >= 0
    return found


# -- what there is when it is frozen -------------------------------------------------------------


def test_what_is_known_of_a_frozen_worker(image: Image) -> None:
    said = image.said
    assert said["inside"] == said["pid"] == 1000
    assert said["control_inode"] > 0
    assert os.path.realpath(sys.executable) in said["libraries"]
    assert any("/libc.so" in path for path in said["libraries"])
    names = {path.name for path in Path(image.directory).iterdir()}
    assert {"inventory.img", "pages-1.img"} <= names
    assert not any(name.endswith(".log") for name in names)
    # A tiny worker's image is tiny.
    assert sum(path.stat().st_size for path in Path(image.directory).iterdir()) < 30 << 20


def test_its_environment_is_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    monkeypatch.setenv("TZ", "UTC")
    environment = freezing_environment(3)
    assert environment["TZ"] == "UTC"
    own = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY"}
    other = {"TORCH_DEVICE_BACKEND_AUTOLOAD", "TOKENIZERS_PARALLELISM"}
    assert set(environment) <= {*ALLOWED, *own, *other}
    assert environment["OMP_NUM_THREADS"] == "3"
    words = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
    assert not any(word in name for name in ALLOWED for word in words)


def test_no_secret_of_its_creator_is_in_the_image(criu: Criu, tmp_path: Path) -> None:
    """Neither one of the environment nor one of the command line."""
    kept, secret, said = (f"{word}-{secrets.token_hex(16)}" for word in ("kept", "secret", "said"))
    env = {**os.environ, "COLDFRAME_CRIU": criu.path, "AWS_TOKEN": secret, "VIRTUAL_ENV": kept}
    with running("freeze_as_a_command", str(tmp_path / "image"), said, env=env) as (_, found):
        assert "pid" in found
    assert holds(tmp_path / "image", kept)
    assert not holds(tmp_path / "image", secret)
    assert not holds(tmp_path / "image", said)


@pytest.mark.heavy
def test_nor_in_that_of_the_real_worker(
    criu: Criu, demo_model: Callable[..., Path], tmp_path: Path
) -> None:
    kept, secret = f"kept-{secrets.token_hex(16)}", f"secret-{secrets.token_hex(16)}"
    store, runs = tmp_path / "store", Path("/tmp") / f"cf-{secrets.token_hex(4)}"
    runs.mkdir(0o700)
    env = {
        **os.environ,
        "COLDFRAME_CRIU": criu.path,
        "COLDFRAME_RUN_DIR": str(runs),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": secret,
        "VIRTUAL_ENV": kept,
    }
    options = ["--snapshot-store", str(store), "--json"]
    command = [str(Path(sys.executable).parent / "coldframe"), "snapshot", "create"]
    done = subprocess.run(
        [*command, str(demo_model()), *options],
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(runs.iterdir()) == []
    runs.rmdir()
    stored = open_store(str(store))
    ((manifest,), skipped) = stored.manifests()
    assert not skipped
    assert manifest.image_bytes < 170e6
    pages = tmp_path / "pages"
    pages.mkdir()
    stored.fetch(manifest, pages)
    assert holds(pages, kept)
    assert holds(pages, "torch.nn.functional")
    assert not holds(pages, secret)


# -- what goes wrong -----------------------------------------------------------------------------


def failure(criu: Criu, directory: Path, prepare: str, **given: Any) -> ColdframeError:
    with pytest.raises(ColdframeError) as caught:
        frozen(criu, directory, prepare, **given)
    return caught.value


@pytest.mark.parametrize(
    ("prepare", "status"), [("os._exit(7)", "7"), ("os.kill(os.getpid(), 9)", "-9")]
)
def test_a_worker_that_dies(criu: Criu, tmp_path: Path, prepare: str, status: str) -> None:
    error = failure(criu, tmp_path / "image", prepare)
    assert isinstance(error, SnapshotError)
    assert error.what == "the worker died before it was warm"
    assert error.got == f"exit status {status}"


def test_a_worker_that_dies_before_it_has_its_order(criu: Criu, tmp_path: Path) -> None:
    order = {"type": "freeze", "prepare": "x" * (4 << 20)}  # more than a socket holds
    with pytest.raises(SnapshotError, match=r"died before it was warm.*exit status 5"):
        freeze(criu, "sys.exit(5)", order, ENVIRONMENT, str(tmp_path), user=False)


def test_a_worker_that_never_is_warm(criu: Criu, tmp_path: Path) -> None:
    error = failure(criu, tmp_path / "image", "import time; time.sleep(600)", warm_s=0.2)
    assert isinstance(error, SnapshotError)
    assert error.what == "the worker was not warm in time"
    assert error.expected == "within 0.2 s"


def test_a_worker_that_says_why_it_cannot_be_frozen(criu: Criu, tmp_path: Path) -> None:
    """Its memory is shared with others: CRIU would write all of it into the image."""
    prepare = (
        "import mmap; from coldframe.snapshot.quiesce import check_quiet\n"
        "fd = os.memfd_create('weights'); os.ftruncate(fd, 4096)\n"
        "shared = mmap.mmap(fd, 4096); null = os.open('/dev/null', os.O_RDWR)\n"
        "for other in (0, 1, 2): os.dup2(null, other)\n"
        "for other in range(4, 20):\n"
        "    try: os.close(other)\n"
        "    except OSError: pass\n"
        "check_quiet(3)"
    )
    error = failure(criu, tmp_path / "image", prepare)
    assert isinstance(error, SnapshotError)
    assert "memfd:weights" in str(error.where)


def test_a_connection_to_the_outside(criu: Criu, tmp_path: Path) -> None:
    """What no worker should have; then it is CRIU that says no."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        prepare = f"import socket; open_one = socket.create_connection(('127.0.0.1', {port}))"
        error = failure(criu, tmp_path / "image", prepare)
    assert isinstance(error, SnapshotError)
    assert error.what == "CRIU cannot write the image"
    assert "Connected TCP socket" in str(error.got)


def test_a_criu_that_dies_half_way(criu: Criu, tmp_path: Path) -> None:
    action, script = tmp_path / "action", tmp_path / "criu"
    action.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ] || kill -9 $PPID\n')
    script.write_text(f'#!/bin/sh\nexec {criu.path} "$@" --action-script {action}\n')
    for path in (action, script):
        path.chmod(0o755)
    error = failure(Criu(str(script), criu.version), tmp_path / "image", "")
    assert isinstance(error, SnapshotError)
    assert "signal 9" in str(error.got)


def test_a_criu_that_is_not_there(tmp_path: Path) -> None:
    error = failure(Criu(str(tmp_path / "none"), "4.1"), tmp_path / "image", "")
    assert isinstance(error, SnapshotError)
    assert error.got == "No such file or directory"


def test_no_room_for_the_image(criu: Criu, tmp_path: Path) -> None:
    args = (str(tmp_path / "small"), "1m")
    with running("freeze_in_memory", *args) as (_, found):
        error = ColdframeError.from_wire(found["error"])
    assert isinstance(error, SnapshotError)
    assert error.what == "CRIU cannot write the image"
    assert "No space left on device" in str(error.got)


# -- the process that does it --------------------------------------------------------------------


class Freezer:
    """The process, and the socket to it."""

    def __init__(self) -> None:
        self.channel, theirs = Channel.pair()
        env = dict(os.environ)
        self.child: Child = spawn_python(
            MAIN, [str(now())], theirs.fileno(), env, site_packages=False
        )
        theirs.close()

    def said(self) -> dict[str, Any]:
        message = self.channel.recv(30)
        assert message is not None
        return message.body

    def end(self) -> int:
        self.channel.close()
        return self.child.wait()


def order(tmp_path: Path, prepare: str = "state = 41") -> dict[str, Any]:
    return {
        "type": "freeze",
        "code": CODE,
        "order": {"type": "freeze", "prepare": prepare},
        "environment": ENVIRONMENT,
        "name": "tiny",
        "model": {"config": "0" * 64, "generation": None, "tokenizer": None, "tensors": "0" * 64},
        "arena": {"weights": [1 << 40, 1 << 30], "kv": [1 << 41, 1 << 30]},
        "store": str(tmp_path / "store"),
        "key_file": None,
        "compress": "auto",
        "device": "cpu",
        "work": str(tmp_path / "work"),
    }


ORACLE = {"prompt_ids": [1], "token_ids": [2], "logprobs": [-0.5]}


def test_an_image_is_tried_and_then_published(criu: Criu, tmp_path: Path) -> None:
    freezer = Freezer()
    freezer.channel.send(order(tmp_path))
    staged = freezer.said()
    assert staged["type"] == "staged", staged
    store = open_store(str(tmp_path / "store"))
    assert store.manifests() == ([], [])  # nobody else sees it yet
    cloner = Cloner.spawn_restorer()
    trial = wanted(tmp_path / "store", None, tmp_path / "trial")
    cloner.prepare({**trial, "manifest": staged["manifest"]})
    child, control = ask_for(cloner, "trial")
    assert [event(cloner).error, event(cloner).error] == [None, None]
    assert ask(control, "state") == 41
    control.close()
    assert child.wait() == 0
    cloner.close()
    freezer.channel.send({"type": "publish", "oracle": ORACLE})
    published = freezer.said()
    assert (published["type"], published["id"]) == ("published", staged["id"])
    assert [span[0] for span in published["spans"]] == ["snapshot_store"]
    ((manifest,), _) = store.manifests()
    assert manifest.id == staged["id"]
    assert manifest.to_json() == published["manifest"]
    assert manifest.process.pid == 1000
    assert freezer.end() == 0
    # What it mounted was seen by itself alone.
    assert list((tmp_path / "work" / "image").iterdir()) == []


def test_an_image_that_nobody_has_tried_is_none(criu: Criu, tmp_path: Path) -> None:
    freezer = Freezer()
    freezer.channel.send(order(tmp_path))
    assert freezer.said()["type"] == "staged"
    assert freezer.end() == 0
    assert open_store(str(tmp_path / "store")).manifests() == ([], [])
    assert list((tmp_path / "store" / "objects").iterdir()) == []


def test_why_there_is_no_image(criu: Criu, tmp_path: Path) -> None:
    freezer = Freezer()
    freezer.channel.send(order(tmp_path, "os._exit(7)"))
    failed = freezer.said()
    assert failed["type"] == "failed"
    assert ColdframeError.from_wire(failed["error"]).got == "exit status 7"
    assert freezer.end() == 0


def test_a_place_that_cannot_be_written(criu: Criu, tmp_path: Path) -> None:
    (tmp_path / "work").touch()
    freezer = Freezer()
    freezer.channel.send(order(tmp_path))
    error = ColdframeError.from_wire(freezer.said()["error"])
    assert isinstance(error, PlatformError)
    assert freezer.end() == 0


def test_a_worker_does_not_outlive_who_warms_it(criu: Criu, tmp_path: Path) -> None:
    warming = tmp_path / "warming"
    freezer = Freezer()
    prepare = f"open({str(warming)!r}, 'w').close(); import time; time.sleep(600)"
    freezer.channel.send(order(tmp_path, prepare))
    until(warming.exists)
    below = [child.pid for child in psutil.Process(freezer.child.pid).children(recursive=True)]
    assert len(below) == 2
    os.kill(freezer.child.pid, signal.SIGKILL)
    assert freezer.end() == -9
    until(lambda: all(gone(pid) for pid in below))
