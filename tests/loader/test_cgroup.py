from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coldframe.loader.cgroup import cpu_count, cpu_quota, memory_available
from tests.support import unavailable

GIB = 1 << 30
V1_MOUNTS = (
    "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "31 25 0:27 / /sys/fs/cgroup/memory rw,nosuid shared:10 - cgroup cgroup rw,memory\n"
    "32 25 0:28 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,name=systemd\n"
)
V2_MOUNT = "33 25 0:29 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID_MOUNT = "34 25 0:30 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw\n"


class Tree:
    """A machine's `/proc` and `/sys/fs/cgroup`, as far as they are read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   67108864 kB\n")  # 64 GiB

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, mounts: str, *groups: str) -> None:
        self.write("proc/self/mountinfo", "25 0 254:0 / / rw - ext4 /dev/vda rw\n" + mounts)
        self.write("proc/self/cgroup", "".join(f"{group}\n" for group in groups))

    def group(self, path: str, **files: str) -> None:
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('__', '.')}", text + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# -- version 2 ------------------------------------------------------------------------------------


def test_v2_the_least_quota_on_the_path_counts(tree: Tree) -> None:
    tree.process(V2_MOUNT, "0::/pods/pod/box")
    tree.group("pods/pod/box", cpu__max="max 100000")
    tree.group("pods/pod", cpu__max="150000 100000")
    tree.group("pods", cpu__max="400000 100000")
    tree.group("other", cpu__max="1000 100000")
    assert cpu_quota(tree.root) == 1.5
    tree.group("pods", cpu__max="25000 50000")
    assert cpu_quota(tree.root) == 0.5


def test_v2_without_a_limit(tree: Tree) -> None:
    tree.process(V2_MOUNT, "0::/box")
    assert cpu_quota(tree.root) is None
    tree.group("box", cpu__max="max 100000")
    assert cpu_quota(tree.root) is None
    assert cpu_count(tree.root) == len(os.sched_getaffinity(0))


def test_v2_in_a_container_that_sees_only_its_own_group(tree: Tree) -> None:
    # Without a cgroup namespace the path is the host's, and not there.
    tree.process(V2_MOUNT, "0::/kubepods/pod1/abc")
    tree.group(".", cpu__max="200000 100000", memory__max=str(2 * GIB), memory__current="0")
    assert cpu_quota(tree.root) == 2.0
    assert memory_available(tree.root) == 2 * GIB


def test_v2_moved_out_of_its_namespace(tree: Tree) -> None:
    tree.process(V2_MOUNT, "0::/../..")
    tree.group(".", cpu__max="200000 100000")
    assert cpu_quota(tree.root) == 2.0


def test_a_bind_mount_shows_a_part_of_the_tree(tree: Tree) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    tree.process(mount, "0::/docker/abc/inner")
    tree.group("inner", cpu__max="100000 100000")
    tree.group(".", cpu__max="300000 100000")
    assert cpu_quota(tree.root) == 1.0
    tree.process(mount, "0::/docker/abcdef/inner")  # another group, whose name begins alike
    assert cpu_quota(tree.root) == 3.0


def test_v2_memory(tree: Tree) -> None:
    tree.process(V2_MOUNT, "0::/a/b")
    tree.group("a/b", memory__max="max", memory__current=str(GIB))
    assert memory_available(tree.root) == 64 * GIB
    stat = f"anon 5\ninactive_file {GIB}\nactive_file 7"
    tree.group("a", memory__max=str(8 * GIB), memory__current=str(3 * GIB), memory__stat=stat)
    assert memory_available(tree.root) == 6 * GIB  # page cache that can be dropped is left
    tree.group("a/b", memory__max=str(2 * GIB))
    assert memory_available(tree.root) == GIB
    tree.group("a/b", memory__current=str(3 * GIB))
    assert memory_available(tree.root) == 0


# -- version 1 ------------------------------------------------------------------------------------


def test_v1_the_least_quota_on_the_path_counts(tree: Tree) -> None:
    tree.process(V1_MOUNTS, "5:cpu,cpuacct:/docker/abc", "4:memory:/m", "1:name=systemd:/x")
    cpu = "cpu,cpuacct"
    tree.group(f"{cpu}/docker/abc", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cpu_quota(tree.root) is None
    tree.group(f"{cpu}/docker", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    tree.group(cpu, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cpu_quota(tree.root) == 3.0
    tree.group(f"{cpu}/docker/abc", cpu__cfs_quota_us="40000", cpu__cfs_period_us="50000")
    assert cpu_quota(tree.root) == 0.8
    # The groups of other controllers have no say.
    tree.group("memory/m", cpu__cfs_quota_us="1000", cpu__cfs_period_us="100000")
    assert cpu_quota(tree.root) == 0.8


def test_v1_memory(tree: Tree) -> None:
    tree.process(V1_MOUNTS, "5:cpu,cpuacct:/", "4:memory:/m/n")
    no_limit = str(0x7FFFFFFFFFFFF000)
    names = ("memory__limit_in_bytes", "memory__usage_in_bytes", "memory__stat")
    tree.group("memory/m/n", **dict(zip(names, (no_limit, str(GIB), ""), strict=True)))
    assert memory_available(tree.root) == 64 * GIB
    stat = f"inactive_file 3\ntotal_inactive_file {GIB}"
    tree.group("memory/m", **dict(zip(names, (str(4 * GIB), str(2 * GIB), stat), strict=True)))
    assert memory_available(tree.root) == 3 * GIB


def test_a_hybrid_machine_has_both(tree: Tree) -> None:
    tree.process(V1_MOUNTS + HYBRID_MOUNT, "5:cpu,cpuacct:/a", "4:memory:/", "0::/b")
    tree.group("cpu,cpuacct/a", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    tree.group("unified/b", cpu__max="100000 100000")
    assert cpu_quota(tree.root) == 1.0
    tree.group("unified/b", cpu__max="max 100000")
    assert cpu_quota(tree.root) == 2.0


# -- neither --------------------------------------------------------------------------------------


def test_a_machine_without_cgroups_or_proc(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert cpu_count(tmp_path) == len(os.sched_getaffinity(0))
    assert memory_available(tmp_path) > 1 << 50


@pytest.mark.parametrize(
    ("quota", "threads"), [(100, 1), (40_000, 1), (149_000, 1), (150_000, 2), (200_000, 2)]
)
def test_a_quota_in_threads(quota: int, threads: int, tree: Tree) -> None:
    tree.process(V2_MOUNT, "0::/")
    tree.group(".", cpu__max=f"{quota} 100000")
    assert cpu_count(tree.root) == min(threads, len(os.sched_getaffinity(0)))


def test_a_quota_larger_than_the_machine(tree: Tree) -> None:
    tree.process(V2_MOUNT, "0::/")
    tree.group(".", cpu__max="100000000 100000")
    assert cpu_count(tree.root) == len(os.sched_getaffinity(0))


# -- the real one ---------------------------------------------------------------------------------


def test_this_machine() -> None:
    assert 1 <= cpu_count() <= len(os.sched_getaffinity(0))
    assert 0 < memory_available() <= psutil.virtual_memory().total


@pytest.fixture
def limited() -> Iterator[Path]:
    """A real group with a quota of half a CPU, or a skip where it cannot be made."""
    name = f"coldframe-test-{os.getpid()}"
    v1 = Path("/sys/fs/cgroup/cpu")
    parent = v1 if (v1 / "cpu.cfs_quota_us").exists() or v1.is_dir() else Path("/sys/fs/cgroup")
    group = parent / name
    try:
        group.mkdir()
    except OSError as error:
        unavailable(f"no group can be made in {parent}: {error.strerror}")
    try:
        try:
            if parent == v1:
                (group / "cpu.cfs_quota_us").write_text("50000")
            else:
                (group / "cpu.max").write_text("50000 100000")
        except OSError as error:
            unavailable(f"no quota can be set in {parent}: {error.strerror}")
        yield group
    finally:
        group.rmdir()


def test_the_quota_of_a_real_group(limited: Path) -> None:
    code = (
        "import sys\n"
        "from coldframe.loader.cgroup import cpu_count, cpu_quota\n"
        "before = cpu_quota()\n"
        "open(sys.argv[1], 'w').write('0')\n"
        "print(before, cpu_quota(), cpu_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(limited / "cgroup.procs")],
        capture_output=True,
        text=True,
        check=True,
    )
    before, quota, count = done.stdout.split()
    assert before != "0.5"
    assert (quota, count) == ("0.5", "1")
