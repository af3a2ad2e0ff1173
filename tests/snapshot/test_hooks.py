from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.hooks import Hooks
from coldframe.snapshot.inherited import Inherited
from tests.snapshot.frozen import ENVIRONMENT, Clone, Frozen, frozen
from tests.support import unavailable

PREPARE = """
import ctypes, logging, os, random, ssl, tempfile, time, uuid
import numpy, torch

own = random.Random(1)
held = {"generators": [numpy.random.default_rng(1), numpy.random.RandomState(1)]}
held["generators"][1].normal()  # keeps the other half of a pair
sampler = torch.Generator()
libc = ctypes.CDLL(None)
libc.drand48.restype = ctypes.c_double

# As after a warm-up: everything has been used once, and OpenMP has its threads.
a = torch.arange(300 * 300, dtype=torch.float64).view(300, 300) / 90000
product = (a @ a).sum().item()
usual = torch.get_num_threads()
random.random(), numpy.random.random(), torch.rand(1), ssl.RAND_bytes(8), uuid.uuid1(), uuid.uuid4()
tempfile.gettempdir()
next(tempfile._get_candidate_names())
"""

DRAWS = {
    "random": "random.random()",
    "random.Random": "own.random()",
    "numpy.random": "numpy.random.random()",
    "numpy Generator": "held['generators'][0].random()",
    "numpy RandomState": "held['generators'][1].random()",
    "half a pair of normals": "held['generators'][1].normal()",
    "torch": "torch.rand(1).item()",
    "torch.Generator": "torch.rand(1, generator=sampler).item()",
    "torch.randperm": "torch.randperm(50).tolist()",
    "libc random": "libc.random()",
    "libc drand48": "libc.drand48()",
    "OpenSSL": "ssl.RAND_bytes(8).hex()",
    "uuid4": "str(uuid.uuid4())",
    "uuid1 node": "uuid.uuid1().node",
    "tempfile": "next(tempfile._get_candidate_names())",
}


@pytest.fixture(scope="module")
def template() -> Iterator[Frozen]:
    """A process with torch at the freeze point, as much like an image as a fork can be."""
    mode = "namespaces" if os.geteuid() == 0 else "template"
    with frozen(PREPARE, mode, {**ENVIRONMENT, "OMP_NUM_THREADS": "2"}) as process:
        yield process


def test_clones_draw_different_random_numbers(template: Frozen) -> None:
    draws = f"[{', '.join(DRAWS.values())}]"
    # Twice each: a generator that keeps something back gives it first.
    one, two = (template.woken().value(f"[{draws}, {draws}]") for _ in range(2))
    for first, second in zip(one, two, strict=True):
        same = [name for name, a, b in zip(DRAWS, first, second, strict=True) if a == b]
        assert same == []


def test_without_hooks_clones_draw_the_same() -> None:
    """What the test above is worth.

    Only what asks the kernel differs, and what Python itself reseeds after a fork, which it would
    not do after a restore.
    """
    if os.geteuid() != 0:
        unavailable("PID namespaces want root")
    bare = PREPARE + "from coldframe.snapshot.hooks import Hooks; hooks = Hooks()"
    with frozen(bare, "namespaces") as process:
        draws = f"[{', '.join(DRAWS.values())}]"
        one, two = (process.woken().value(draws) for _ in range(2))
    different = [name for name, a, b in zip(DRAWS, one, two, strict=True) if a != b]
    assert different == ["random", "uuid4"]


def test_droppable_memory_is_emptied_before_the_freeze() -> None:
    """Where glibc keeps random bytes from 2.41 on."""
    prepare = """
import mmap
try:
    memory = mmap.mmap(-1, 8192, flags=0x08 | mmap.MAP_ANONYMOUS)  # MAP_DROPPABLE
    memory[:] = b"x" * 8192
except OSError:
    memory = None
"""
    # Not in a fork, for which the kernel empties it.
    with frozen(prepare) as process:
        clone = Clone(process.channel)
        clone.wake()
        left = clone.value("memory and memory[:].count(0)")
    if left is None:
        unavailable("this kernel has no droppable memory (Linux 6.11)")
    assert left == 8192


def test_the_environment_is_replaced_as_a_whole(template: Frozen) -> None:
    clone = template.woken({"HELLO": "world", "PATH": "/new"})
    assert clone.value("dict(os.environ)") == {"HELLO": "world", "PATH": "/new"}
    libc = "libc.getenv.restype = ctypes.c_char_p"
    assert clone.value("libc.getenv(b'CREATORS_OWN')", libc) is None
    assert clone.value("libc.getenv(b'HELLO').decode()") == "world"
    assert "CREATORS_OWN" in ENVIRONMENT


def test_the_time_zone_is_the_new_one(template: Frozen) -> None:
    assert template.woken().value("time.localtime(0).tm_hour") == 0
    assert template.woken({"TZ": "XYZ-5"}).value("time.localtime(0).tm_hour") == 5


def test_the_temporary_directory_is_the_new_one(template: Frozen, tmp_path: Path) -> None:
    clone = template.woken({"TMPDIR": str(tmp_path)})
    assert clone.value("tempfile.gettempdir()") == str(tmp_path)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_thread_count_is_the_new_one_and_openmp_works(template: Frozen, threads: int) -> None:
    clone = template.woken(threads=threads)
    if threads == clone.value("usual"):  # then nothing starts ahead of its use
        assert clone.value("len(os.listdir('/proc/self/task'))") == 1
    assert clone.value("torch.get_num_threads()") == threads
    assert clone.value("abs((a @ a).sum().item() / product - 1) < 1e-12") is True
    big = "((torch.ones(3000, 1000) + 1).sum().item(), len(os.listdir('/proc/self/task')))"
    total, running = clone.value(big)
    assert total == 6_000_000.0
    assert (running > 1) == (threads > 1)


def test_uuid1_keeps_the_rules(template: Frozen) -> None:
    clone = template.woken()
    ids = clone.value("[[(u := uuid.uuid1()).version, u.node, u.time] for _ in range(3)]")
    versions, nodes, times = zip(*ids, strict=True)
    assert set(versions) == {1}
    assert len(set(nodes)) == 1
    assert nodes[0] >> 40 & 1  # multicast: no network card has it
    assert list(times) == sorted(set(times))


def test_standard_error_and_output_go_where_the_front_wants(
    template: Frozen, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("ab") as file:
        clone = template.woken(stderr=file.fileno())
    write = "import sys; sys.stderr.write('from Python\\n'); sys.stderr.flush(); "
    write += "os.write(1, b'to output\\n'); libc.puts(b'from C'); libc.fflush(None)"
    write += "; handler = logging.StreamHandler(); logging.getLogger('x').addHandler(handler)"
    write += "; logging.getLogger('x').error('logged')"
    clone.value("0", write)
    assert log.read_text() == "from Python\nto output\nfrom C\nlogged\n"
    open_now = clone.value("sorted(os.listdir('/proc/self/fd'), key=int)")
    assert open_now[:3] == ["0", "1", "2"]
    # Besides: the control socket, and the listing itself.
    assert len(open_now) == 5


def test_log_files_are_closed_for_the_freeze_and_opened_in_each_clone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    prepare = f"""
import logging
log = logging.getLogger("kept")
log.addHandler(logging.FileHandler({str(log)!r}, mode="w"))
log.error("creator")
"""
    with frozen(prepare, "template") as process:
        clones = [process.woken() for _ in range(2)]
        for number, clone in enumerate(clones):
            clone.value("0", f"log.error('clone {number}')")
        # Not through the descriptor of another.
        moved = tmp_path / "moved"
        log.rename(moved)
        process.woken().value("0", "log.error('clone 2')")
    assert moved.read_text() == "creator\nclone 0\nclone 1\n"
    assert log.read_text() == "clone 2\n"


def test_log_records_count_from_the_restore(template: Frozen) -> None:
    record = "logging.LogRecord('x', 0, '', 0, '', (), None)"
    born = "logging._startTime"
    clone = template.woken()
    assert clone.value(f"0 <= {record}.created - {born} < 5")
    assert clone.value(f"{born} * 1e9") >= template.child.spawned_ns - 10**9


def test_a_log_file_that_cannot_be_opened_again_fails_its_hook(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    prepare = f"import logging; h = logging.FileHandler({str(folder / 'log')!r})"
    with frozen(prepare, "template") as process:
        (folder / "log").unlink()
        folder.rmdir()
        with pytest.raises(SnapshotError, match="logging") as caught:
            process.woken()
    assert "FileNotFoundError" in str(caught.value)


REGISTERED = """
from coldframe.snapshot.hooks import Hooks
hooks = Hooks.standard()
order = []
hooks.register("first", lambda wake: order.append(("first", wake.environment["A"])))
hooks.register("second", {second})
"""


def test_registered_hooks_run_in_order_after_the_built_in_ones() -> None:
    second = "lambda wake: order.append(('second', os.environ['A']))"
    prepare = "import os" + REGISTERED.format(second=second)
    with frozen(prepare, "template") as process:
        clone = process.woken({"A": "b"})
        assert clone.value("order") == [["first", "b"], ["second", "b"]]
        ran = clone.value("[[r.name, r.start_ns, r.end_ns] for r in wake.ran]")
    names, starts, ends = zip(*ran, strict=True)
    assert names[:2] == ("stderr", "environment")
    assert names[-2:] == ("first", "second")
    moments = [moment for pair in zip(starts, ends, strict=True) for moment in pair]
    assert moments == sorted(moments)


def test_a_hook_that_raises_ends_the_clone_and_is_named() -> None:
    prepare = REGISTERED.format(second="lambda wake: 1 / 0")
    with frozen(prepare, "template") as process:
        for _ in range(2):
            with pytest.raises(SnapshotError, match="a hook failed") as caught:
                process.woken({"A": "b"})
            assert caught.value.where == "second"
            assert "ZeroDivisionError" in str(caught.value.got)


def test_names_are_taken_once() -> None:
    hooks = Hooks()
    hooks.register("mine", print)
    with pytest.raises(SnapshotError, match="same name"):
        hooks.register("mine", print)


def package(folder: Path, hook: str) -> str:
    """Statements that put an installed package with an entry point on the path."""
    metadata = folder / "pool-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pool\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[coldframe.snapshot_hooks]\nreconnect = {hook}\n")
    (folder / "pool.py").write_text("made = []\ndef reconnect(wake): made.append(wake.name)\n")
    return f"import sys; sys.path.insert(0, {str(folder)!r})"


def test_entry_points_are_hooks(tmp_path: Path) -> None:
    with frozen(package(tmp_path, "pool:reconnect"), "template") as process:
        clone = process.woken()
        # Imported before the freeze, run after it.
        assert clone.value("sys.modules['pool'].made", "import sys") == ["clone"]


def test_an_entry_point_that_cannot_be_imported_is_refused_at_the_freeze(tmp_path: Path) -> None:
    prepare = package(tmp_path, "pool:missing")
    with pytest.raises(SnapshotError, match="reconnect = pool:missing"), frozen(prepare):
        pass


MADE = """
import os, resource
os.umask(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (777, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from coldframe.snapshot.inherited import Inherited
"""


def test_a_fork_inherits_from_this_start() -> None:
    here = Inherited.here()
    raised = MADE + "os.nice(3)\n" if os.geteuid() == 0 else MADE  # and lowered again
    with frozen(raised, "template") as process:
        clone = process.woken()
        assert Inherited.from_wire(clone.value("Inherited.here().to_wire()")) == here


def test_what_cannot_be_raised_stays_and_the_umask_does_not() -> None:
    here = Inherited.here()
    shed = "resource.setrlimit(resource.RLIMIT_NOFILE, (777, 888)); os.nice(3)\n"
    shed += "from coldframe.snapshot.privileges import shed; shed()"
    with frozen(MADE + shed, "template") as process:
        clone = process.woken()
        got = Inherited.from_wire(clone.value("Inherited.here().to_wire()"))
    assert got.umask == here.umask
    # As much as there may be.
    assert got.limits == {**here.limits, "RLIMIT_NOFILE": (888, 888)}
    assert got.nice == here.nice + 3
