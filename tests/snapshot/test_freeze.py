from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.loader.wire import Channel, Message
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.inherited import Inherited
from coldframe.snapshot.wake import Wake
from tests.snapshot.frozen import ENVIRONMENT, Clone, frozen, said
from tests.support import unavailable

LURKER = """
import threading
over = threading.Event()
threading.Thread(target=over.wait, name="lurker", daemon=True).start()
"""


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture(scope="module")
def libgomp() -> str:
    """The OpenMP that torch brings along, without the seconds that torch takes to import."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    packages = Path(spec.origin).parents[1]
    found = glob.glob(f"{packages}/torch*/**/libgomp*.so*", recursive=True)
    return found[0] if found else unavailable("this torch has no libgomp of its own")


def parallel(libgomp: str, body: str) -> str:
    """Statements that define `parallel(threads)`, which runs `body` in each thread."""
    return f"""
import ctypes
library = ctypes.CDLL({libgomp!r})
failures = []
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    try:
        {body}
    except Exception as error:
        failures.append(error)
def parallel(threads):
    library.GOMP_parallel(body, None, threads, 0)
    if failures:
        raise failures[0]
"""


def test_waking_up() -> None:
    with frozen("import os; os.chdir('/tmp')") as process:
        clone = Clone(process.channel)
        clone.wake({"A": "b"}, threads=3)
        wake = clone.value(
            "[wake.name, wake.environment, wake.threads, wake.run_dir, wake.started_ns]"
        )
        assert wake == ["clone", {"A": "b"}, 3, "/run", 1]
        assert clone.value("os.getcwd()", "import os") == "/"
        assert process.state["pid"] == process.child.pid


def test_the_first_instant_is_after_the_message_and_before_the_hooks() -> None:
    with frozen() as process:
        before = process.child.spawned_ns
        clone = Clone(process.channel)
        clone.wake()
        first, start, end = clone.value(
            "[wake.first_ns, wake.ran[0].start_ns, wake.ran[-1].end_ns]"
        )
        assert before < first <= start <= end


def test_the_end_of_the_socket_ends_it_quietly() -> None:
    with frozen("import atexit; atexit.register(print, 'not this way')") as process:
        process.channel.hang_up()
        assert process.child.wait() == 0


def test_everything_is_as_it_was_in_the_clone() -> None:
    with frozen("kept = {'a': [1, 2]}; import gc; gc.disable()", "template") as process:
        clone = process.woken()
        assert clone.value("[kept, gc.isenabled(), gc.get_freeze_count() > 1000]") == [
            {"a": [1, 2]},
            False,
            True,
        ]


def test_text_that_was_held_back_is_not_written_by_each_clone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Buffered, both in Python and in C, and flushed before it leads to /dev/null.
    prepare = "import sys, ctypes; libc = ctypes.CDLL(None); libc.printf(b'from C '); print('text')"
    with frozen(prepare, "template") as process:
        for _ in range(2):
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            clone = process.woken(stderr=fd)
            os.close(fd)
            clone.value("0", "sys.stdout.flush(); libc.fflush(None)")
    assert log.read_text() == ""


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        pytest.param("import socket; s = socket.socket()", "descriptor", id="socket"),
        pytest.param("import os; fd = os.open('/etc/passwd', 0)", "/etc/passwd", id="file"),
        pytest.param("import os; fd = os.memfd_create('weights')", "memfd:weights", id="memfd"),
        pytest.param(
            "import os, mmap; fd = os.memfd_create('weights'); os.truncate(fd, 4096);"
            "m = mmap.mmap(fd, 4096, prot=mmap.PROT_READ); os.closerange(4, 64)",
            "memfd:weights",
            id="mapped memfd",
        ),
        pytest.param(
            "import mmap; m = mmap.mmap(-1, 4096)", "shared memory", id="anonymous shared memory"
        ),
        pytest.param(
            "import os, mmap, tempfile; f = tempfile.TemporaryFile(); f.truncate(4096);"
            "m = mmap.mmap(f.fileno(), 4096, flags=mmap.MAP_PRIVATE); os.closerange(4, 64)",
            "a deleted file",
            id="deleted file",
        ),
        pytest.param("import select; e = select.epoll()", "eventpoll", id="epoll"),
        pytest.param("import os; e = os.eventfd(0)", "eventfd", id="eventfd"),
        pytest.param("streams = (0, 1)", "descriptor 2", id="standard error"),
        pytest.param(LURKER, "lurker", id="thread"),
        pytest.param(
            "import ctypes, os, signal\n"
            "if os.fork() == 0: ctypes.CDLL(None).prctl(1, 9); os.close(3); signal.pause()",
            "child processes",
            id="child",
        ),
    ],
)
def test_what_may_not_be_frozen_is_refused_by_its_name(prepare: str, named: str) -> None:
    with pytest.raises(SnapshotError, match="cannot be frozen") as caught, frozen(prepare):
        pass
    assert named in str(caught.value)


def test_io_uring_is_refused() -> None:
    setup = (
        "import ctypes; fd = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120))"
    )
    scope: dict[str, Any] = {}
    exec(setup, scope)
    if scope["fd"] < 0:
        unavailable("this kernel has no io_uring for us")
    os.close(scope["fd"])
    with pytest.raises(SnapshotError, match="io_uring"), frozen(setup):
        pass


def test_openmp_is_paused_and_works_again_in_each_clone(libgomp: str) -> None:
    prepare = parallel(libgomp, "seen.append(library.omp_get_thread_num())")
    prepare += "seen = []\nparallel(4)\nimport os; threads = len(os.listdir('/proc/self/task'))"
    with frozen(prepare, "template") as process:
        for _ in range(2):
            clone = process.woken()
            assert clone.value("threads") == 4
            assert clone.value("len(os.listdir('/proc/self/task'))") == 1
            assert clone.value("sorted(seen)", "seen.clear(); parallel(3)") == [0, 1, 2]


def test_an_openmp_that_does_not_pause_is_refused_by_its_name(libgomp: str) -> None:
    prepare = "from coldframe.snapshot.quiesce import quiesce\n"
    # Within a parallel region there is no ending the threads that run it.
    prepare += parallel(libgomp, "quiesce(3)") + "parallel(1)"
    with pytest.raises(SnapshotError, match="did not end its threads") as caught, frozen(prepare):
        pass
    assert caught.value.where == libgomp


def test_an_openmp_pool_of_another_thread_is_refused(libgomp: str) -> None:
    lurker = LURKER.replace("target=over.wait", "target=run, args=(over,)")
    prepare = parallel(libgomp, "pass")
    prepare += "def run(over):\n parallel(3)\n up.set()\n over.wait()\n"
    prepare += "import threading; up = threading.Event()" + lurker + "up.wait()"
    with pytest.raises(SnapshotError, match="other threads") as caught, frozen(prepare):
        pass
    # Python knows one of the three by name.
    assert caught.value.got is not None
    assert len(caught.value.got.split(", ")) == 3
    assert "lurker" in caught.value.got


def test_openmp_that_would_spin_is_refused(libgomp: str) -> None:
    environment = {**ENVIRONMENT, "OMP_WAIT_POLICY": "active"}
    prepare = f"import ctypes; library = ctypes.CDLL({libgomp!r})"
    with (
        pytest.raises(SnapshotError, match="OMP_WAIT_POLICY=PASSIVE"),
        frozen(prepare, environment=environment),
    ):
        pass


def test_memory_given_back_to_libc_is_given_back_to_the_kernel() -> None:
    # Blocks below the threshold of mmap, under one that stays: free alone keeps them.
    prepare = """
import ctypes, re
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"Anonymous: +([0-9]+) kB", file.read())[1])
blocks = [libc.malloc(60000) for _ in range(1000)]
for block in blocks: ctypes.memset(block, 1, 60000)
stays = libc.malloc(60000)
full = anonymous()
for block in blocks: libc.free(block)
del blocks
"""
    with frozen(prepare, "template") as process:
        clone = process.woken()
        assert clone.value("full - anonymous()") > 50_000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"type": "init"}, "type"),
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"environment": {"A": 1}}, "environment: A"),
        ({"environment": None}, "environment"),
        ({"run_dir": None}, "run_dir"),
        ({"inherited": None}, "inherited"),
        ({"inherited": {**Inherited.here().to_wire(), "umask": 0o1000}}, "inherited"),
        ({"inherited": {**Inherited.here().to_wire(), "limits": {"A": [1]}}}, "inherited"),
        ({"identity": {"uid": 1, "gid": 1}}, "identity"),
        ({"identity": {"uid": -1, "gid": 1, "groups": []}}, "identity"),
    ],
)
def test_a_wrong_message_is_refused_by_its_field(change: dict[str, object], named: str) -> None:
    body = {**Wake.message("clone", {}, 1, "/run", 1, Identity(1, 2, (3,))), **change}
    with pytest.raises(SnapshotError) as caught:
        Wake.from_message(Message(body, ()), 5)
    assert caught.value.where == named


def test_a_message_goes_there_and_back() -> None:
    identity = Identity(1000, 1001, (4, 5))
    left, right = Channel.pair()
    with open(os.devnull) as null:
        left.send(Wake.message("w-1", {"A": "b"}, 2, "/run/x", 77, identity), [null.fileno()])
        wake = Wake.from_message(said(right), 99)
    left.close()
    right.close()
    assert wake.stderr is not None
    os.close(wake.stderr)
    assert (wake.name, wake.environment, wake.threads) == ("w-1", {"A": "b"}, 2)
    assert (wake.run_dir, wake.started_ns, wake.first_ns) == ("/run/x", 77, 99)
    assert wake.identity == identity
    assert wake.inherited == Inherited.here()


def test_a_wrong_message_ends_the_clone_with_the_reason() -> None:
    with frozen(mode="template") as process:
        clone = process.clone()
        clone.channel.send({"type": "init"})
        with pytest.raises(SnapshotError, match="does not understand"):
            said(clone.channel)
        assert clone.channel.recv(timeout=60) is None
        process.woken()  # the template goes on


ON_A_GPU = "state = {'gpu': {}}\n"
DRIVERS_THREAD = """
import ctypes
libc = ctypes.CDLL(None)
thread, pause = ctypes.c_ulong(), ctypes.cast(libc.pause, ctypes.c_void_p)
libc.pthread_create(ctypes.byref(thread), None, pause, None)
"""


def test_what_a_driver_has_is_left_to_the_checkpoint_of_its_context() -> None:
    prepare = f"{ON_A_GPU}{DRIVERS_THREAD}import os, socket\n"
    prepare += "kept = [os.pipe(), os.eventfd(0), socket.socketpair()]"
    with frozen(prepare) as process:
        assert process.state["gpu"] == {}
    with pytest.raises(SnapshotError, match="pipe"), frozen("import os; os.pipe()"):
        pass


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        pytest.param(LURKER, "lurker", id="thread"),
        pytest.param("file = open('/etc/hostname')", "/etc/hostname", id="file"),
        pytest.param("import os; fd = os.memfd_create('vram')", "/memfd:vram", id="memfd"),
        pytest.param(
            "import mmap, os; fd = os.memfd_create('vram'); os.ftruncate(fd, 4096)\n"
            "seen = mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED); os.close(fd)",
            "vram",
            id="mapping",
        ),
    ],
)
def test_what_is_ours_has_to_be_gone_on_a_gpu_too(prepare: str, named: str) -> None:
    with pytest.raises(SnapshotError) as caught, frozen(ON_A_GPU + prepare):
        pass
    assert named in f"{caught.value.where} {caught.value.got}"
