"""A resident template of a worker without torch: the keeper, its forks, and fronts that ask."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from coldframe.loader.errors import (
    ColdframeError,
    PlatformError,
    ReplicaError,
    SnapshotError,
)
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.snapshot.cloner import CloneChild, Cloner
from coldframe.snapshot.forking import Forker
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import template_directory, templates
from coldframe.snapshot.template import ForkSource
from coldframe.snapshot.template_socket import TemplateSocket
from coldframe.snapshot.wake import Wake
from tests.snapshot.tiny import ask, event, gone, until
from tests.support import unavailable

ROOT = Path(__file__).parents[2]
NAME = "a model"
KEY = ModelKey("a" * 64, None, None, "b" * 64)

# Runs in the template, and behind the freeze point in each clone.
WORKER = """import os, sys, random, uuid
from coldframe.loader.errors import ColdframeError
from coldframe.loader.wire import Channel
from coldframe.snapshot.forking import fork_on_demand
from coldframe.snapshot.freeze import freeze_point
from coldframe.snapshot.hooks import Hooks
control = Channel.from_fd(3)
scope = {"os": os, "random": random, "uuid": uuid, "control": control}
try:
    exec(control.recv().body["prepare"], scope)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    hooks = Hooks.standard()
    def picky(wake):
        if "REFUSED" in wake.environment:
            raise ValueError("not this one")
    hooks.register("picky", picky)
    _, scope["wake"] = freeze_point(control, {}, fork_on_demand, hooks)
    while (message := control.recv()) is not None:
        exec(message.body["first"], scope)
        control.send({"type": "value", "value": eval(message.body["value"], scope)})
except ColdframeError as error:
    control.send({"type": "broken", "error": error.to_wire()})
os._exit(0)
"""
KEEPER = """import json, sys, signal
from coldframe.loader.errors import ColdframeError
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.template import Template
def stop(number, _):
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
given = json.loads(sys.argv[1])
order = {"type": "freeze", "prepare": given["prepare"]}
try:
    template = Template(
        given["name"], ModelKey(*given["key"]), given["code"], order, given["environment"]
    )
except ColdframeError as error:
    print(json.dumps({"error": error.to_wire()}), flush=True)
    raise SystemExit(1)
try:
    print(json.dumps({"path": template.path, "pid": template.pid, "id": template.id}), flush=True)
    template.serve()
except ColdframeError as error:
    print(json.dumps({"error": error.to_wire()}), flush=True)
finally:
    template.close()
"""
ENVIRONMENT = {"PATH": os.defpath}
WANTED: dict[str, Any] = {
    "store": "",
    "name": NAME,
    "directory": None,
    "manifest": None,
    "hash": True,
    "key_file": None,
    "work": "",
}


class Keeper(NamedTuple):
    """A process that keeps a template."""

    process: subprocess.Popen[str]
    path: str
    pid: int
    id: str

    def front(self) -> Cloner:
        """A front that may have clones."""
        cloner = Cloner.connect(self.path)
        cloner.prepare(WANTED)
        assert event(cloner).error is None
        return cloner

    def said(self) -> dict[str, Any]:
        """The next that it prints."""
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where templates have their sockets; nothing is left there, and no process."""
    base = tempfile.mkdtemp(prefix="cf-")  # a socket's path is short, pytest's are not
    monkeypatch.setenv("COLDFRAME_RUN_DIR", base)
    before = len(os.listdir("/proc/self/fd"))
    yield Path(template_directory())
    assert psutil.Process().children(recursive=True) == []
    assert len(os.listdir("/proc/self/fd")) <= before
    os.rmdir(base)


@contextlib.contextmanager
def spawned(prepare: str = "", code: str = WORKER) -> Iterator[subprocess.Popen[str]]:
    given = {
        "name": NAME,
        "key": list(KEY),
        "code": code,
        "prepare": prepare,
        "environment": ENVIRONMENT,
    }
    command = [sys.executable, "-c", KEEPER, json.dumps(given)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


@contextlib.contextmanager
def resident(prepare: str = "") -> Iterator[Keeper]:
    """A template that is ready; ended afterwards by SIGTERM, where it still lives."""
    with spawned(prepare) as process:
        assert process.stdout is not None
        yield Keeper(process, **json.loads(process.stdout.readline()))


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with resident("state = 41") as found:
        yield found


@pytest.fixture
def front(keeper: Keeper) -> Iterator[Cloner]:
    cloner = keeper.front()
    yield cloner
    cloner.close()


@contextlib.contextmanager
def clone(
    cloner: Cloner, name: str = "w", environment: dict[str, str] | None = None
) -> Iterator[tuple[CloneChild, Channel]]:
    """A clone that was started and woken, and our end of its control socket."""
    ours, theirs = Channel.pair()
    with contextlib.closing(ours):
        child = cloner.clone(name, theirs.fileno())
        theirs.close()
        ours.send(Wake.message(name, environment or {}, 1, "/run", 1))
        while child.pid == 0:
            told = event(cloner)
            assert told.error is None, told
        yield child, ours


# -- clones ---------------------------------------------------------------------------------------


def test_a_clone_goes_on_where_the_template_waits(keeper: Keeper, front: Cloner) -> None:
    with clone(front, "first", {"A": "b"}) as (child, control):
        found = "[state, wake.name, os.environ['A'], os.getpid(), os.getppid()]"
        assert ask(control, found) == [41, "first", "b", child.pid, keeper.pid]
        # Its own group: what a terminal says to the template's it does not hear.
        assert os.getpgid(child.pid) == child.pid
        assert os.listdir(f"/proc/{child.pid}/task") == [str(child.pid)]
    assert front.image == keeper.id
    assert front.manifest is not None
    assert ModelKey.from_json(front.manifest["model"]) == KEY


def test_no_clone_sees_what_another_does(front: Cloner) -> None:
    with clone(front, "first") as (_, first), clone(front, "second") as (_, second):
        assert ask(first, "state", "state += 1") == 42
        assert ask(second, "state") == 41


def test_clones_draw_different_random_numbers(front: Cloner) -> None:
    drawn = "[random.random(), uuid.uuid1().hex, os.urandom(8).hex()]"
    with clone(front, "first") as (_, first), clone(front, "second") as (_, second):
        for one, other in zip(ask(first, drawn), ask(second, drawn), strict=True):
            assert one != other


def test_a_clone_has_its_own_socket_and_no_other(keeper: Keeper, front: Cloner) -> None:
    other = keeper.front()
    try:
        with clone(front, "first"), clone(other, "other"), clone(front, "last") as (child, control):
            ask(control, "state")  # it is past the fork then
            links = {
                fd: os.readlink(f"/proc/{child.pid}/fd/{fd}")
                for fd in os.listdir(f"/proc/{child.pid}/fd")
            }
            assert links.pop("3").startswith("socket:")
            assert links == dict.fromkeys("012", "/dev/null")
    finally:
        other.close()


def test_many_clones_at_once(front: Cloner) -> None:
    with contextlib.ExitStack() as stack:
        clones = [stack.enter_context(clone(front, f"w{i}")) for i in range(12)]
        for number, (_, control) in enumerate(clones):
            control.send({"first": f"state += {number}", "value": "state"})
        for number, (_, control) in enumerate(clones):
            answer = control.recv(10)
            assert answer is not None
            assert answer.body["value"] == 41 + number


@pytest.mark.parametrize(
    ("how", "status"),
    [("os._exit(7)", 7), ("os._exit(0)", 0), ("os.kill(os.getpid(), 15)", -15)],
)
def test_how_a_clone_ends_is_passed_on(front: Cloner, how: str, status: int) -> None:
    with clone(front) as (child, control):
        control.send({"first": how, "value": "0"})
        assert child.wait() == status
        assert child.kill() == status


def test_a_clone_ends_when_it_is_killed_and_others_do_not(front: Cloner) -> None:
    with clone(front, "first") as (first, _), clone(front, "second") as (_, second):
        assert first.kill() == -signal.SIGKILL
        assert gone(first.pid)
        assert ask(second, "state") == 41


def test_a_clone_whose_hook_fails_says_so_to_its_own_front(front: Cloner) -> None:
    with clone(front, "refused", {"REFUSED": "1"}) as (child, control):
        message = control.recv(10)
        assert message is not None
        assert message.kind == "broken"
        error = ColdframeError.from_wire(message.body["error"])
        assert error.where == "picky"
        assert child.wait() == 1
    with clone(front, "next") as (_, control):
        assert ask(control, "state") == 41


def test_a_clone_that_nobody_wakes_ends(front: Cloner) -> None:
    ours, theirs = Channel.pair()
    child = front.clone("never woken", theirs.fileno())
    theirs.close()
    ours.close()
    assert child.wait() == 0


# -- what ends with what --------------------------------------------------------------------------


def test_the_end_of_a_front_ends_its_clones_alone(keeper: Keeper, front: Cloner) -> None:
    other = keeper.front()
    with clone(front) as (kept, control):
        with clone(other, "a") as (a, _), clone(other, "b") as (b, _):
            other.close()
            until(lambda: gone(a.pid) and gone(b.pid))
        assert ask(control, "state") == 41
        assert [child.pid for child in psutil.Process(keeper.pid).children()] == [kept.pid]


def test_a_dead_template_takes_its_clones_along_and_fronts_hear_of_it(
    keeper: Keeper, front: Cloner
) -> None:
    with clone(front) as (child, control):
        os.kill(keeper.pid, signal.SIGKILL)
        until(lambda: gone(child.pid))
        assert control.recv(10) is None
        assert child.wait() == -signal.SIGKILL
    error = ColdframeError.from_wire(keeper.said()["error"])
    assert isinstance(error, SnapshotError)
    assert error.got == "exit status -9"
    until(lambda: front.receive() or front.closed)
    assert isinstance(front.error, ReplicaError)
    assert keeper.process.wait(10) == 0
    assert not os.path.exists(keeper.path)


def test_nothing_is_left_when_the_keeper_is_killed(directory: Path) -> None:
    with resident() as keeper, contextlib.closing(keeper.front()) as front:
        with clone(front) as (child, _):
            keeper.process.kill()
            until(lambda: gone(keeper.pid) and gone(child.pid))
            assert child.wait() == -signal.SIGKILL
        with pytest.raises(ReplicaError, match="no template listens"):
            Cloner.connect(keeper.path)
    assert len(templates()) == 1
    with resident() as keeper:  # takes away what the other could not
        assert templates() == [keeper.path]
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_of_it(front: Cloner, keeper: Keeper, number: int) -> None:
    with clone(front) as (child, _):
        keeper.process.send_signal(number)
        keeper.process.wait(10)
        # Not a moment later: who waits for the keeper may count on it.
        assert gone(child.pid)
        assert gone(keeper.pid)
        assert child.wait() == -signal.SIGKILL
    assert not os.path.exists(keeper.path)


# -- templates that do not come to be -------------------------------------------------------------


def refused(prepare: str = "", code: str = WORKER) -> ColdframeError:
    """Why there is no template."""
    with spawned(prepare, code) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert process.wait(10) == 1
    return ColdframeError.from_wire(said["error"])


def test_a_worker_that_cannot_be_frozen_is_no_template(directory: Path) -> None:
    error = refused("kept = open('/dev/zero')")
    assert isinstance(error, SnapshotError)
    assert error.got == "/dev/zero"
    assert not directory.exists()


@pytest.mark.parametrize(("end", "code"), [("os._exit(3)", 3), ("raise KeyError", 1)])
def test_a_worker_that_dies_is_no_template(end: str, code: int) -> None:
    assert refused(end).got == f"exit status {code}"


def test_what_the_shell_has_left_open_is_not_passed_on(directory: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    given = {"name": NAME, "key": list(KEY), "code": WORKER, "prepare": "", "environment": {}}
    command = [sys.executable, "-c", KEEPER, json.dumps(given)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[write]) as process:
        os.close(write)
        os.close(read)
        assert process.stdout is not None
        assert "path" in json.loads(process.stdout.readline())
        process.terminate()


def test_no_room_for_another_process() -> None:
    with resident(NO_PROCESSES) as keeper, contextlib.closing(keeper.front()) as front:
        ours, theirs = Channel.pair()
        child = front.clone("w", theirs.fileno())
        theirs.close()
        error = event(front).error
        ours.close()
        assert isinstance(error, PlatformError)
        assert error.got == os.strerror(errno.ENOMEM)
        assert child.wait() == 1


# Where the first process of a PID namespace has ended, no other can be made in it.
NO_PROCESSES = """
from coldframe.snapshot.linux import NEW_PIDS, NEW_USER, unshare
unshare(NEW_PIDS if os.geteuid() == 0 else NEW_PIDS | NEW_USER)
pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
"""


# -- what fits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.here()


@pytest.fixture
def source(machine: Machine) -> Iterator[Callable[..., ForkSource]]:
    """Makes a source whose template is of some model and machine."""
    control, other = Channel.pair()

    def make(key: ModelKey = KEY, **changed: Any) -> ForkSource:
        there = machine._replace(**changed)
        return ForkSource(NAME, key, there, Forker(control), Recorder("snapshot"), "template-1")

    yield make
    control.close()
    other.close()


def test_a_template_of_the_same_fits(
    source: Callable[..., ForkSource], demo_model: Callable[..., Path]
) -> None:
    model = demo_model()
    key = ModelKey.of(model)
    wanted = {**WANTED, "directory": str(model), "name": "a name of its own"}
    found = source(key).prepare(wanted)
    assert found["id"] == "template-1"
    assert ModelKey.from_json(found["manifest"]["model"]) == key


@pytest.mark.parametrize(
    ("field", "then"),
    [("torch", "2.0.1"), ("coldframe", "0.0.9 0123456789abcdef"), ("python", "3.9.0 cpython-39")],
)
def test_what_is_installed_now_must_be_what_the_template_runs(
    source: Callable[..., ForkSource], field: str, then: str
) -> None:
    with pytest.raises(SnapshotError, match="does not fit") as caught:
        source(**{field: then}).prepare(WANTED)
    assert caught.value.where == field
    assert caught.value.expected == then


def test_another_model_does_not_fit(
    source: Callable[..., ForkSource], demo_model: Callable[..., Path]
) -> None:
    wanted = {**WANTED, "directory": str(demo_model())}
    with pytest.raises(SnapshotError) as caught:
        source(ModelKey.of(demo_model("qwen3"))).prepare(wanted)
    assert caught.value.where == "model.config"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "another model"}, "name"),
        ({"manifest": {}}, "image"),
    ],
)
def test_what_is_not_wanted_does_not_fit(
    source: Callable[..., ForkSource], change: dict[str, Any], field: str
) -> None:
    with pytest.raises(SnapshotError) as caught:
        source().prepare({**WANTED, **change})
    assert caught.value.where == field


def test_a_front_that_was_refused_gets_no_clone(keeper: Keeper) -> None:
    cloner = Cloner.connect(keeper.path)
    cloner.prepare({**WANTED, "name": "another model"})
    ours, theirs = Channel.pair()
    child = cloner.clone("w", theirs.fileno())
    theirs.close()
    refusal, failure = event(cloner), event(cloner)
    assert refusal.name is None
    assert isinstance(refusal.error, SnapshotError)
    assert isinstance(failure.error, SnapshotError)
    assert failure.name == "w"
    assert child.wait() == 1
    assert psutil.Process(keeper.pid).children() == []
    cloner.close()
    ours.close()


# -- the socket -----------------------------------------------------------------------------------


def test_the_socket_is_private_and_named_after_the_model(directory: Path) -> None:
    first = TemplateSocket.open(KEY)
    second = TemplateSocket.open(KEY)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in (first.path, second.path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert os.path.basename(path).startswith(KEY.digest[:16])
    assert sorted(templates()) == sorted([first.path, second.path])
    first.close()
    assert templates() == [second.path]
    second.close()
    assert not directory.exists()


def test_a_directory_that_others_can_write_to_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o770)
    with pytest.raises(PlatformError, match="this user's alone"):
        TemplateSocket.open(KEY)
    directory.rmdir()


def test_a_link_in_the_directorys_place_is_refused(directory: Path, tmp_path: Path) -> None:
    directory.symlink_to(tmp_path)
    with pytest.raises(PlatformError, match="cannot listen"):
        TemplateSocket.open(KEY)
    assert list(tmp_path.iterdir()) == []
    directory.unlink()


def test_a_path_that_is_too_long_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(PlatformError, match="too long"):
        TemplateSocket.open(KEY)


def test_another_user_is_not_served(keeper: Keeper, directory: Path) -> None:
    if os.geteuid() != 0:
        unavailable("only root can be another user")
    directory.parent.chmod(0o711)
    directory.chmod(0o711)
    os.chmod(keeper.path, 0o666)
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        "s.connect(sys.argv[1]); print(s.recv(1))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, keeper.path]
    done = subprocess.run(command, capture_output=True, check=False)
    directory.chmod(0o700)
    assert done.stdout == b"b''\n", done.stderr
    with contextlib.closing(keeper.front()):  # its own user still is
        pass


def test_a_template_of_another_user_is_not_taken(directory: Path) -> None:
    if os.geteuid() != 0:
        unavailable("only root can be another user")
    found = TemplateSocket.open(KEY)
    os.chown(found.path, 65534, 65534)
    with pytest.raises(SnapshotError, match="another user"):
        Cloner.connect(found.path)
    found.close()


def test_what_is_no_socket_is_swept_and_what_listens_is_not(directory: Path) -> None:
    directory.mkdir(0o700)
    (directory / "a file").touch()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead"))
    living = TemplateSocket.open(KEY)
    assert templates() == [living.path]
    living.close()
