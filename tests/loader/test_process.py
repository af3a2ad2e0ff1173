from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.loader.process import (
    Child,
    make_run_dir,
    remove_run_dir,
    spawn_python,
    sweep_run_dirs,
)
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")  # a short path: that of a socket has 107 bytes


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def until(done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def spawn(
    code: str, *args: str, env: dict[str, str] | None = None, bare: bool = False
) -> tuple[Child, Channel]:
    ours, theirs = Channel.pair()
    env = dict(os.environ) if env is None else env
    child = spawn_python(code, args, theirs.fileno(), env, site_packages=not bare)
    theirs.close()
    return child, ours


def inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # that of the listing itself
        return False


# What a child finds; it answers on the descriptor that it inherited.
LOOK = """
import json, os, fcntl
from coldframe.loader.wire import Channel
channel = Channel.from_fd(3)
fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
       if os.path.exists(f"/proc/self/fd/{fd}")}
channel.send({
    "open": fds, "stdin": os.read(0, 10).decode(), "group": os.getpgrp(), "pid": os.getpid(),
    "args": sys.argv[1:], "first_ns": first_ns, "env": dict(os.environ), "json": json.__file__,
    "site": "site" in sys.modules, "gc": gc.isenabled(),
})
"""


def look(*args: str, env: dict[str, str] | None = None, bare: bool = False) -> dict[str, Any]:
    child, ours = spawn(LOOK, *args, env=env, bare=bare)
    message = ours.recv(timeout=20)
    assert child.wait() == 0
    ours.close()
    assert message is not None
    return message.body


def test_a_child_inherits_one_descriptor_and_no_more(tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w"):
        found = look("a", "b c")["open"]
    # What whoever started the tests has let us inherit passes on as well.
    ours = {fd for fd in os.listdir("/proc/self/fd") if inheritable(int(fd))}
    assert set(found) - ours == {"0", "1", "2", "3"} - ours
    assert set(found) >= {"0", "1", "2", "3"}
    assert not any(target.endswith("secret") for target in found.values())
    assert found["0"] == "/dev/null"
    assert found["1"] == found["2"]
    assert found["3"].startswith("socket:")


def test_a_child_reads_nothing_and_is_told_its_arguments() -> None:
    before = now()
    found = look("a", "b c", env={**os.environ, "MARK": "x"})
    assert found["stdin"] == ""
    assert found["args"] == ["a", "b c"]
    assert found["env"]["MARK"] == "x"
    assert before < found["first_ns"] < now()


def test_a_child_is_in_a_group_of_its_own() -> None:
    found = look()
    assert found["group"] == found["pid"] != os.getpgrp()


def test_what_a_child_prints_goes_to_standard_error() -> None:
    code = (
        "import os, socket\n"
        "from coldframe.loader.process import spawn_python\n"
        "ours, theirs = socket.socketpair()\n"
        "said = 'print(\"said\", flush=True)'\n"
        "child = spawn_python(said, [], theirs.fileno(), dict(os.environ))\n"
        "assert child.wait() == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "said\n")


def test_modules_of_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "socket", "coldframe", "time"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    for bare in (False, True):
        assert not look(bare=bare)["json"].startswith(str(tmp_path))


def test_a_child_that_needs_no_installed_packages_finds_ours_all_the_same() -> None:
    assert look()["site"] is True
    assert look(bare=True)["site"] is False
    child, ours = spawn("import torch", bare=True)
    assert child.wait() == 1
    ours.close()


def test_a_child_starts_without_the_collector_until_it_is_up() -> None:
    assert look()["gc"] is False
    code = (
        "from coldframe.loader.process import collect_garbage\n"
        "collect_garbage()\n"
        "sys.exit(0 if gc.isenabled() and gc.get_freeze_count() else 5)"
    )
    child, ours = spawn(code)
    assert child.wait() == 0
    ours.close()


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_any_descriptor_can_be_passed(number: int) -> None:
    """Also one that lies where the child's own are to be, in a parent started without them."""
    code = (
        "import os, socket, sys\n"
        "from coldframe.loader.process import spawn_python\n"
        "number = int(sys.argv[1])\n"
        "saved = os.dup(2)\n"
        "ours, theirs = socket.socketpair()\n"
        "os.dup2(theirs.fileno(), number)\n"
        "fcntl = __import__('fcntl')\n"
        "fcntl.fcntl(number, fcntl.F_SETFD, fcntl.FD_CLOEXEC)\n"
        "child = spawn_python('import os; os.write(3, b\"here\")', [], number, dict(os.environ))\n"
        "assert child.wait() == 0\n"
        "answer = ours.recv(10)\n"
        "os.dup2(saved, 2)\n"
        "sys.exit(0 if answer == b'here' else repr(answer))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(number)], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_end_of_a_child() -> None:
    child, ours = spawn("sys.exit(7)")
    assert child.wait() == child.wait() == child.poll() == child.kill() == 7
    ours.close()
    child, ours = spawn("import os; os.read(3, 1)")
    assert child.poll() is None
    assert child.kill() == -signal.SIGKILL
    assert child.poll() == child.wait() == -signal.SIGKILL
    ours.close()


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with (
        open("/dev/null") as null,
        pytest.raises(PlatformError, match="cannot start a process, in /nonexistent/python"),
    ):
        spawn_python("pass", [], null.fileno(), {})


def test_a_child_dies_with_its_parent() -> None:
    code = (
        "import os, socket, sys, time\n"
        "from coldframe.loader.process import spawn_python\n"
        "ours, theirs = socket.socketpair()\n"
        "child = spawn_python(\n"
        "    'import os; from coldframe.loader.process import die_with_parent;'\n"
        "    'die_with_parent(int(sys.argv[1])); os.write(3, b\"x\");'\n"
        "    'import time; time.sleep(100)',\n"
        "    [str(os.getpid())], theirs.fileno(), dict(os.environ))\n"
        "assert ours.recv(1) == b'x'\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until(lambda: not alive(pid))


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from coldframe.loader.process import die_with_parent; die_with_parent(1); sys.exit(0)"
    child, ours = spawn(code)
    assert child.wait() == 1
    ours.close()


# -- the run directory ----------------------------------------------------------------------------


def test_a_run_directory_is_private_and_has_room_for_sockets(base: Path) -> None:
    path, lock = make_run_dir(str(base))
    assert Path(path).parent == base
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert fcntl.fcntl(lock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(path, "memory.sock"))
    remove_run_dir(path)
    assert list(base.iterdir()) == []
    remove_run_dir(path)
    os.close(lock)


def test_a_path_as_long_as_may_be_takes_a_socket_and_one_longer_is_refused(base: Path) -> None:
    name = len(os.path.basename((made := make_run_dir(str(base)))[0]))
    os.close(made[1])
    os.rmdir(made[0])
    room = 107 - len("/memory.sock") - 1 - name - len(f"{base}/")
    parent = base / ("x" * room)
    parent.mkdir()
    path, lock = make_run_dir(str(parent))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(path, "memory.sock"))
    os.close(lock)
    remove_run_dir(path)
    parent = base / ("x" * room + "y")
    parent.mkdir()
    with pytest.raises(PlatformError, match="too long for sockets") as caught:
        make_run_dir(str(parent))
    assert (caught.value.expected, caught.value.got) == ("at most 95 bytes", "96 bytes")
    assert caught.value.hint is not None
    assert "COLDFRAME_RUN_DIR" in caught.value.hint
    assert list(parent.iterdir()) == []


def test_a_directory_that_cannot_be_made(base: Path) -> None:
    with pytest.raises(PlatformError, match="cannot make the run directory") as caught:
        make_run_dir(str(base / "nothing"))
    assert caught.value.got == "No such file or directory"


def test_where_it_is_made_by_default(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "COLDFRAME_RUN_DIR"):
        folder = base / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
        path, lock = make_run_dir()
        assert Path(path).parent == folder
        os.close(lock)
        assert sweep_run_dirs() == [path]
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(base / "nothing"))
    with pytest.raises(PlatformError, match="cannot make the run directory"):
        make_run_dir()  # what was asked for, or an error; never somewhere else
    monkeypatch.delenv("COLDFRAME_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "nothing"))
    path, lock = make_run_dir()
    assert Path(path).parent == base / "tmpdir"
    os.close(lock)
    remove_run_dir(path)


@pytest.mark.parametrize("spare", [0, 1])
def test_one_that_is_too_long_for_sockets_is_not_the_default(
    base: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    # A process with a longer number is to look in the same place, so that it sweeps there.
    name = len(f"/coldframe-{os.getuid()}-4194304-01234567/memory.sock")
    folder = base / ("x" * (107 - name - len(f"{base}/") + spare))
    folder.mkdir()
    monkeypatch.delenv("COLDFRAME_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(folder))
    path, lock = make_run_dir()
    assert Path(path).parent == (Path("/tmp") if spare else folder)
    os.close(lock)
    remove_run_dir(path)
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(folder / "y"))
    with pytest.raises(PlatformError, match="the run directory"):
        make_run_dir()  # that was asked for


def test_a_sweep_removes_what_nobody_uses_and_nothing_else(base: Path) -> None:
    used, lock = make_run_dir(str(base))
    left, left_lock = make_run_dir(str(base))
    (Path(left) / "memory.sock").touch()
    os.close(left_lock)
    other_user = base / f"coldframe-{os.getuid() + 1}-1-abc"
    other_user.mkdir()
    (base / "coldframe-notes").mkdir()
    elsewhere = base / "precious"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    link = base / f"coldframe-{os.getuid()}-1-link"
    link.symlink_to(elsewhere)
    file = base / f"coldframe-{os.getuid()}-1-file"
    file.touch()
    expected = {Path(used), other_user, base / "coldframe-notes", elsewhere, link, file}
    assert sweep_run_dirs(str(base)) == [left]
    assert set(base.iterdir()) == expected
    assert (elsewhere / "file").exists()
    os.close(lock)
    assert sweep_run_dirs(str(base)) == [used]


def test_a_directory_whose_replica_was_killed_is_swept_by_the_next(base: Path) -> None:
    code = (
        "import sys, time\n"
        "from coldframe.loader.process import make_run_dir\n"
        "path, lock = make_run_dir(sys.argv[1])\n"
        "print(path, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        path = owner.stdout.readline().strip()
        assert sweep_run_dirs(str(base)) == []
        owner.kill()
    assert sweep_run_dirs(str(base)) == [path]


def test_a_sweep_in_the_wrong_moment_takes_no_directory_from_under_its_maker(base: Path) -> None:
    code = (
        "import sys\n"
        "from coldframe.loader.process import sweep_run_dirs\n"
        "print('sweeps', flush=True)\n"
        "while True: sweep_run_dirs(sys.argv[1])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True
    ) as sweeper:
        assert sweeper.stdout is not None
        sweeper.stdout.readline()
        for _ in range(3000):
            path, lock = make_run_dir(str(base))
            assert os.path.isdir(path)
            remove_run_dir(path)
            os.close(lock)
        sweeper.kill()


GRANDCHILD = (
    "import os, subprocess\n"
    "other = subprocess.Popen(['sleep', '100'])\n"
    "os.write(3, str(other.pid).encode())\n"
)


@pytest.mark.parametrize("way", ["killed", "ends", "told to end"])
def test_a_leader_takes_along_what_it_has_started(way: str) -> None:
    ours, theirs = socket.socketpair()
    code = GRANDCHILD + ("" if way == "ends" else "os.read(3, 1)")
    child = spawn_python(code, (), theirs.fileno(), dict(os.environ), leads=True)
    theirs.close()
    pid = int(ours.recv(20))
    if way == "killed":
        assert child.poll() is None
        assert alive(pid)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    elif way == "ends":
        assert until(lambda: child.poll() is not None)
        assert child.poll() == 0
    else:
        assert child.kill() == -signal.SIGKILL
    ours.close()
    until(lambda: not alive(pid))
    assert child.poll() == child.wait() == child.kill()


def test_others_leave_theirs_alone() -> None:
    ours, theirs = socket.socketpair()
    child = spawn_python(GRANDCHILD, (), theirs.fileno(), dict(os.environ))
    theirs.close()
    pid = int(ours.recv(20))
    ours.close()
    assert child.wait() == 0
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_the_first_words_go_elsewhere() -> None:
    code = (
        "import os, socket\n"
        "from coldframe.loader.process import spawn_python\n"
        "ours, theirs = socket.socketpair()\n"
        "words = os.memfd_create('words')\n"
        'said = \'print("first", flush=True); print("too", file=sys.stderr);\'\n'
        "said += 'from coldframe.loader.process import speak_up; speak_up();'\n"
        'said += \'print("then", flush=True); import os; print(os.listdir("/proc/self/fd"))\'\n'
        "child = spawn_python(said, [], theirs.fileno(), dict(os.environ), words=words)\n"
        "assert child.wait() == 0\n"
        "assert os.pread(words, 99, 0) == b'first\\ntoo\\n'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    then, listed, *rest = done.stderr.splitlines()
    assert (then, rest) == ("then", [])
    assert "'4'" not in listed.replace("'3', '4'", "'3'")  # one is that of the listing itself
