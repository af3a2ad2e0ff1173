from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import OLDEST, Criu, last_error
from coldframe.snapshot.restoring import restore
from tests.snapshot.tiny import (
    SHIFT,
    SHIFT_FIRST,
    Image,
    ask,
    descriptors,
    gone,
    mounts,
    running,
    until,
)

DAYS_30 = 30 * 24 * 3600


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def says(version: str) -> str:
    return f"echo Version: {version}"


# -- found ---------------------------------------------------------------------------------------


def test_the_named_one_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = program(tmp_path / "named", says("4.2"))
    on_path = program(tmp_path / "bin" / "criu", says("9.0"))
    monkeypatch.delenv("COLDFRAME_CRIU", raising=False)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert Criu.find() == Criu(str(on_path), "9.0")
    monkeypatch.setenv("COLDFRAME_CRIU", str(named))
    assert Criu.find() == Criu(str(named), "4.2")


def test_an_old_one_on_the_path_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = program(tmp_path / "old" / "criu", says("3.17.1"))
    new = program(tmp_path / "new" / "criu", says("4.1"))
    monkeypatch.delenv("COLDFRAME_CRIU", raising=False)
    monkeypatch.setenv("PATH", f"{old.parent}:{new.parent}")
    assert Criu.find() == Criu(str(new), "4.1")


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (says("3.17.1"), "is 3.17.1"),
        (says("4.0.9"), "is 4.0.9"),
        ("exit 1", "does not run"),
        ("echo not a version", "does not run"),
    ],
)
def test_the_named_one_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, got: str
) -> None:
    named = program(tmp_path / "named", text)
    better = program(tmp_path / "bin" / "criu", says("4.1"))
    monkeypatch.setenv("PATH", str(better.parent))
    monkeypatch.setenv("COLDFRAME_CRIU", str(named))
    with pytest.raises(SnapshotError) as caught:
        Criu.find()
    assert caught.value.got == f"{named} {got}"
    assert caught.value.expected == f"{OLDEST[0]}.{OLDEST[1]} or later"
    assert "make criu" in str(caught.value.hint)


def test_one_that_is_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Version: 4.1")
    for path in (tmp_path / "text", tmp_path / "none", tmp_path):
        monkeypatch.setenv("COLDFRAME_CRIU", str(path))
        with pytest.raises(SnapshotError, match="does not run"):
            Criu.find()


def test_it_needs_nothing_of_the_environment(criu: Criu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout's own is found by whoever has no PATH, as a service may."""
    monkeypatch.setenv("COLDFRAME_CRIU", criu.path)
    monkeypatch.delenv("PATH")
    assert Criu.find() == criu


# -- asked ---------------------------------------------------------------------------------------


def test_the_one_here_is_what_it_says(criu: Criu) -> None:
    said = subprocess.run([criu.path, "--version"], capture_output=True, text=True, check=True)
    assert f"Version: {criu.version}\n" in said.stdout
    criu.check()


def test_why_it_does_not_work_is_told(tmp_path: Path) -> None:
    text = 'echo "Error (criu/x.c:1): It is too cold" >&2; exit 1'
    with pytest.raises(SnapshotError) as caught:
        Criu(str(program(tmp_path / "criu", text)), "4.1").check()
    assert caught.value.got == "It is too cold"
    with pytest.raises(SnapshotError, match="cannot be asked"):
        Criu(str(tmp_path / "none"), "4.1").check()


def test_without_privileges_it_says_so(criu: Criu) -> None:
    caps = "-sys_admin,-checkpoint_restore"
    with running("check_criu", criu.path, under=["setpriv", "--bounding-set", caps]) as (_, found):
        assert "CAP_SYS_ADMIN or the CAP_CHECKPOINT_RESTORE" in found["error"]["got"]


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            "Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: "
            "Operation not permitted\n"
            "pie: 1000: Error (criu/pie/restorer.c:346): Unable to restore capabilities: -1\n"
            "Error (criu/cr-restore.c:2320): Restoring FAILED.\n",
            "Unable to restore capabilities: -1",
        ),
        (
            "(00.017) Warn  (criu/kerndat.c:1): this is none\n"
            "(00.018) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using "
            "--tcp-established option.\n"
            "(00.019) Error (criu/cr-dump.c:2128): Dumping FAILED.\n",
            "inet: Connected TCP socket, consider using --tcp-established option.",
        ),
        (
            "Error (criu/net.c:1253): net: Unexpected error: -1(Operation not permitted)\n",
            "net: Unexpected error: -1(Operation not permitted)",
        ),
        ("CRIU needs to have the CAP_SYS_ADMIN capability\n", "CRIU needs to have the"),
        ("", "nothing"),
    ],
)
def test_the_cause_is_told_and_not_what_follows_from_it(log: str, told: str) -> None:
    assert last_error(log).startswith(told)


# -- restored ------------------------------------------------------------------------------------


class Clones:
    """Clones of an image, made by this process."""

    def __init__(self, image: Image, folder: Path) -> None:
        self._image, self._folder = image, folder
        self.clones: list[Any] = []

    def start(self) -> Channel:
        ours, theirs = Channel.pair()
        work = self._folder / f"work-{len(self.clones)}"
        work.mkdir()
        image = self._image
        fd = theirs.fileno()
        init = restore(image.criu, image.process, image.directory, str(work), fd, user=False)
        theirs.close()
        self.clones.append((init, ours))
        return ours

    def started(self) -> None:
        """Waits until CRIU has ended, which is to be seen beside a clone until then."""
        for init, _ in self.clones:
            assert init.channel.recv(10).kind == "started"

    def end(self) -> list[int]:
        for _, control in self.clones:
            control.close()
        return [init.reap() for init, _ in self.clones]


def test_what_it_knows_survives_and_clones_are_apart(image: Image, tmp_path: Path) -> None:
    before, fds = mounts(tmp_path), descriptors()
    clones = Clones(image, tmp_path)
    controls = [clones.start() for _ in range(8)]
    for number, control in enumerate(controls):
        assert ask(control, "(state, os.getpid())", "state += 1") == [42, image.said["pid"]]
        ask(control, "None", f"state = {number}")
    assert [ask(control, "state") for control in controls] == list(range(8))
    clones.started()
    outside = [init.inside() for init, _ in clones.clones]
    assert len(set(outside)) == 8
    assert mounts(tmp_path) == before
    assert clones.end() == [0] * 8
    assert all(gone(pid) for pid in outside)
    assert descriptors() == fds


def test_a_clone_sees_its_own_processes_alone(image: Image, tmp_path: Path) -> None:
    clones = Clones(image, tmp_path)
    control = clones.start()
    clones.started()
    seen = "sorted(int(name) for name in os.listdir('/proc') if name.isdigit())"
    assert ask(control, seen) == [1, image.said["pid"]]
    assert ask(control, "os.getppid()") == 1
    # All that it has open: /dev/null three times, its socket, and the listing itself.
    assert len(ask(control, "os.listdir('/proc/self/fd')")) == 5
    assert clones.end() == [0]


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("os._exit(7)", 7),
        ("os.kill(os.getpid(), 9)", -9),
        ("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.kill(0, 11)", -11),
    ],
)
def test_how_it_ends_is_told(image: Image, tmp_path: Path, last: str, status: int) -> None:
    clones = Clones(image, tmp_path)
    control = clones.start()
    assert ask(control, "state") == 41
    control.send({"first": last, "value": "None"})
    assert control.recv(10) is None
    assert clones.end() == [status]


def test_signals_reach_it(image: Image, tmp_path: Path) -> None:
    clones = Clones(image, tmp_path)
    polite, plain, interrupted = (clones.start() for _ in range(3))
    ask(polite, "None", "import signal; signal.signal(15, lambda *_: os._exit(3))")
    # What whoever froze it has blocked is not blocked in clones.
    blocked = "sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert ask(plain, blocked, "import signal") == []
    ask(interrupted, "None", "import signal; signal.signal(2, signal.SIG_DFL)")
    for (init, _), number in zip(clones.clones, (15, 15, 2), strict=True):
        os.kill(init.pid, number)
    assert [init.reap() for init, _ in clones.clones] == [3, -15, -2]
    clones.end()


def test_children_of_a_clone_end_with_it(image: Image, tmp_path: Path) -> None:
    clones = Clones(image, tmp_path)
    control = clones.start()
    ask(control, "None", "import time\nif os.fork() == 0: os.setsid(); time.sleep(60)")
    clones.started()
    init, _ = clones.clones[0]
    inside = init.inside()
    with open(f"/proc/{inside}/task/{inside}/children") as file:
        (child,) = file.read().split()
    os.kill(inside, 9)
    assert init.reap() == -9
    until(lambda: gone(int(child)))
    clones.end()


def test_a_clone_without_a_start_to_serve_ends(image: Image, tmp_path: Path) -> None:
    clones = Clones(image, tmp_path)
    clones.start()
    assert clones.end() == [0]


def test_what_criu_says_is_told_when_a_file_of_the_image_is_not_there(
    image: Image, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    for entry in Path(image.directory).iterdir():
        if entry.name != "pages-1.img":
            (part / entry.name).symlink_to(entry)
    clones = Clones(image._replace(directory=str(part)), tmp_path)
    control = clones.start()
    init, _ = clones.clones[0]
    message = init.channel.recv(10)
    assert message.kind == "failed"
    assert message.body["error"]["got"] == "exit status 1: Can't read pages data (-9)"
    assert control.recv(10) is None
    assert clones.end() == [1]


# -- clocks --------------------------------------------------------------------------------------


def shifted(seconds: int) -> list[str]:
    return [
        *("unshare", "--time", "--fork", "--kill-child"),
        *("--monotonic", str(seconds), "--boottime", str(seconds)),
    ]


def test_an_image_from_before_a_reboot(criu: Criu, tmp_path: Path) -> None:
    """The clock of the machine is 30 days behind that of the image."""
    with running("freeze_one", str(tmp_path / "image"), under=shifted(DAYS_30)) as (_, said):
        image = Image(criu, str(tmp_path / "image"), said)
    clones = Clones(image, tmp_path)
    frozen_ns = time.monotonic_ns() + DAYS_30 * 10**9
    _check_clock(clones.start(), frozen_ns, time.monotonic_ns)
    assert clones.end() == [0]


def test_an_image_of_a_machine_that_has_just_started(image: Image, tmp_path: Path) -> None:
    """The clock of the machine is 30 days ahead of that of the image."""
    frozen_ns = time.monotonic_ns()
    args = (image.criu.path, image.directory, str(image.said["pid"]))
    inode = str(image.said["control_inode"])
    with running("clone_one", *args, inode, str(tmp_path), under=shifted(DAYS_30)) as (_, told):
        state, pid, shift, clock = told["value"]
        before, after = told["asked"]
        assert (state, pid) == (41, image.said["pid"])
        assert abs(clock - frozen_ns) < 600 * 10**9
        # As both see the machine's own clock.
        assert before <= clock - shift + told["shift"] + 5_000_000
        assert clock - shift + told["shift"] <= after + 5_000_000
        assert told["shift"] > (DAYS_30 - 1) * 10**9


def _check_clock(control: Channel, frozen_ns: int, clock_ns: Any) -> None:
    before = clock_ns()
    state, _, shift, clock = ask(control, SHIFT, SHIFT_FIRST)
    after = clock_ns()
    assert state == 41
    # It goes on from where it was frozen, some seconds ago.
    assert abs(clock - frozen_ns) < 600 * 10**9
    assert before - 5_000_000 <= clock - shift <= after + 5_000_000
