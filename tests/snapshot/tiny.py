"""A tiny worker without torch: frozen in a quarter of a second, its clones do what a test says."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import Recorder, clock_shift_ns, now
from coldframe.loader.wire import Channel
from coldframe.snapshot.cloner import CloneChild, CloneEvent, Cloner
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.dumping import freeze
from coldframe.snapshot.freezer import freezing_environment
from coldframe.snapshot.init import start_init
from coldframe.snapshot.linux import own_mounts
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Arena, Draft, Manifest, Process, Reservation
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.restoring import restore
from coldframe.snapshot.store import open_store

ROOT = Path(__file__).parents[2]
_OTHERS = (Path(tempfile.gettempdir()), ROOT / "build", Path("/var/lib/containers"))
CODE = f"sys.path.insert(0, {str(ROOT)!r}); from tests.snapshot.tiny import main; main()"
ENVIRONMENT = {"PATH": os.defpath}


# -- in the process under test -------------------------------------------------------------------


def main() -> None:
    """Does what its order says, freezes, and then in each clone what the messages say."""
    control = Channel.from_fd(3)
    order = control.recv()
    assert order is not None
    scope: dict[str, Any] = {"control": control, "os": os, "fds": order.fds, "more": {}}
    try:
        exec(order.body["prepare"], scope)
    except ColdframeError as error:
        control.send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    control.send({"type": "frozen", "inside": os.getpid(), **scope["more"]})
    while (message := control.recv()) is not None:
        exec(message.body["first"], scope)
        control.send({"type": "value", "value": eval(message.body["value"], scope)})
    os._exit(0)


# -- in a process of its own that stands for a front ---------------------------------------------


def front(wanted: str, count: str) -> None:
    """Has clones made, tells how they fare and what they know, and waits for its input to end."""
    cloner = Cloner.spawn_restorer()
    cloner.prepare(json.loads(wanted))
    clones = [ask_for(cloner, f"clone-{number}") for number in range(int(count))]
    told = [event(cloner) for _ in range(1 + len(clones))]
    controls = [control for child, control in clones if not child.failed]
    report = {
        "restorer": cloner._child.pid if cloner._child else None,
        "errors": [[name, error.to_wire()] for name, error in told if error is not None],
        "clones": [child.pid for child, _ in clones],
        "values": [ask(control, SHIFT, SHIFT_FIRST) for control in controls],
    }
    print(json.dumps(report), flush=True)
    sys.stdin.read()
    cloner.close()


def choose_as(user: str, wanted: str) -> None:
    """Has an image chosen and read by a user, and tells which one that was."""
    from coldframe.snapshot.restorer import ImageSource  # the worker is to be without it

    source = ImageSource(Recorder("test"), Criu.find())
    sys.executable = os.path.realpath(sys.executable)  # the user may be kept from looking there
    os.setgroups([])
    os.setresgid(*[int(user)] * 3)
    os.setresuid(*[int(user)] * 3)
    dumpable = 4
    ctypes.CDLL(None).prctl(dumpable, 1, 0, 0, 0)  # as who never was root: its /proc is its own
    try:
        print(json.dumps({"id": source.prepare(json.loads(wanted))["id"]}), flush=True)
    except ColdframeError as error:
        print(json.dumps({"error": error.to_wire()}), flush=True)
    sys.stdin.read()


SHIFT_FIRST = "import time; from coldframe.loader.timeline import clock_shift_ns"
SHIFT = "[state, os.getpid(), clock_shift_ns(), time.monotonic_ns()]"


# -- in processes of their own that start a PID 1 ------------------------------------------------


def hold_an_init() -> None:
    init = start_init(lambda _: os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60"))
    init.channel.recv(10)
    print(json.dumps({"pids": [init.pid, init.inside()]}), flush=True)
    sys.stdin.read()


def mounts_around_an_init() -> None:
    before = mounts()
    init = start_init(lambda _: os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60"))
    init.channel.recv(10)
    during = mounts()
    init.kill()
    shared = any("shared:" in line for line in before)
    print(json.dumps({"before": before, "during": during, "shared": shared}), flush=True)


def try_an_init() -> None:
    try:
        start_init(lambda _: os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60"))
    except ColdframeError as error:
        left = [child.pid for child in psutil.Process().children()]
        print(json.dumps({"error": error.to_wire(), "left": left}), flush=True)


# -- in processes of their own that call CRIU ----------------------------------------------------


def check_criu(path: str) -> None:
    try:
        Criu(path, "").check()
    except SnapshotError as error:
        print(json.dumps({"error": error.to_wire()}), flush=True)


def freeze_one(directory: str, prepare: str = "state = 41") -> None:
    """Freezes a tiny worker: what was said, or `error`."""
    try:
        found = frozen(Criu.find(), Path(directory), prepare, user=own_mounts()).said
    except ColdframeError as error:
        found = {"error": error.to_wire()}
    print(json.dumps(found), flush=True)


def freeze_as_a_command(directory: str, *_: str) -> None:
    """Freezes a tiny worker as `coldframe snapshot create` does, with what that hands down."""
    environment = freezing_environment(1)
    print(json.dumps(frozen(Criu.find(), Path(directory), environment=environment).said))


def freeze_in_memory(directory: str, size: str) -> None:
    """Freezes a tiny worker where there is little room."""
    os.mkdir(directory)
    own_mounts()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    freeze_one(f"{directory}/image")


def clone_one(criu: str, directory: str, pid: str, inode: str, work: str) -> None:
    """Restores one clone: `value` (see `SHIFT`), when that was `asked`, and `shift` here."""
    ours, theirs = Channel.pair()
    process = Process(int(pid), int(inode), "", False)
    init = restore(Criu(criu, ""), process, directory, work, theirs.fileno(), user=own_mounts())
    theirs.close()
    before = now()
    try:
        value = ask(ours, SHIFT, SHIFT_FIRST)
    except SnapshotError as error:
        value = str(error)
    found = {"value": value, "asked": [before, now()], "shift": clock_shift_ns()}
    ours.close()
    print(json.dumps({**found, "status": init.reap()}), flush=True)


# -- in the test ---------------------------------------------------------------------------------


class Image(NamedTuple):
    """A frozen tiny worker."""

    criu: Criu
    directory: str
    said: dict[str, Any]

    @property
    def process(self) -> Process:
        said = self.said
        return Process(said["pid"], said["control_inode"], self.criu.version, False)

    def stored(self, store: Path, compress: str = "auto") -> Manifest:
        """Puts it into a store, as what `Freezer` does."""
        draft = Draft(
            "tiny",
            ModelKey("0" * 64, None, None, "0" * 64),
            Machine.here(libraries=self.said["libraries"]),
            Arena(Reservation(1 << 40, 1 << 30), Reservation(1 << 41, 1 << 30)),
            self.process,
        )
        return open_store(str(store)).put(self.directory, draft, compress=compress)


def frozen(criu: Criu, directory: Path, prepare: str = "", **given: Any) -> Image:
    """Freezes a tiny worker that has run `prepare`."""
    directory.mkdir()
    environment = given.pop("environment", ENVIRONMENT)
    order = {"type": "freeze", "prepare": prepare}
    given = {"user": False, **given}
    said = freeze(criu, CODE, order, environment, str(directory), **given)
    return Image(criu, str(directory), said)


def ask(control: Channel, value: str, first: str = "") -> Any:
    """What an expression is in a clone, after some statements."""
    control.send({"first": first, "value": value})
    answer = control.recv(timeout=20)
    if answer is None:
        raise SnapshotError("the clone has ended")
    return answer.body["value"]


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Waits until something is so; it fails where it does not come to be so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to be so"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ask_for(cloner: Cloner, name: str) -> tuple[CloneChild, Channel]:
    """Asks for a clone: the child, and our end of its control socket."""
    ours, theirs = Channel.pair()
    child = cloner.clone(name, theirs.fileno())
    theirs.close()
    return child, ours


def event(cloner: Cloner) -> CloneEvent:
    """The next thing that comes of what was asked for."""
    deadline = time.monotonic() + 20
    while not cloner.events:
        assert time.monotonic() < deadline, "no word"
        cloner.receive(1.0)
    return cloner.events.popleft()


def wanted(store: Path, manifest: Manifest | None, work: Path) -> dict[str, Any]:
    """What a front tells who makes clones."""
    return {
        "store": str(store),
        "name": "tiny",
        "directory": None,
        "manifest": None if manifest is None else manifest.to_json(),
        "hash": True,
        "key_file": None,
        "work": str(work),
        "device": "cpu",
    }


@contextlib.contextmanager
def starting(
    function: str, *args: str, under: Sequence[str] = (), env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a function of this module.

    Args:
        function: Its name.
        args: Its arguments.
        under: A command that goes before, such as `unshare`.
        env: Its environment, by default this one.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.snapshot import tiny; "
        "getattr(tiny, sys.argv[2])(*sys.argv[3:])"
    )
    command = [*under, sys.executable, "-P", "-c", code, str(ROOT), function, *args]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def running(
    function: str, *args: str, under: Sequence[str] = (), env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The same with the JSON line that it prints; afterwards its input ends, and so does it."""
    with starting(function, *args, under=under, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"it said nothing, and ended with {process.wait()}"
        yield process, json.loads(line)
        process.stdin.close()
        process.wait(20)


def mounts(ours: Path | None = None) -> list[str]:
    """What is mounted in this process's namespace, but for what others have in folders of theirs.

    Args:
        ours: A temporary folder that is not others'.
    """

    def counts(line: str) -> bool:
        point = Path(line.split()[4])
        theirs = any(folder in point.parents for folder in _OTHERS)
        return not theirs or (ours is not None and point.is_relative_to(ours))

    return list(filter(counts, Path("/proc/self/mountinfo").read_text().splitlines()))


def descriptors(pid: int | str = "self") -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
