"""What the container allows: CPUs and memory under cgroup v1 or v2, on the whole path to the root.

A limit may be set on any ancestor; the least one counts. In a container the process often sees
only its own group mounted as the root, so missing ancestors are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_count", "cpu_quota", "memory_available", "memory_limit", "meminfo"]

# v1 writes "no limit" as the largest page-rounded 63-bit number.
_NO_LIMIT = 1 << 60


def cpu_count(root: str | Path = "/") -> int:
    """The threads that can really run at once: the quota, rounded, within the affinity mask."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    # 1.5 CPUs run two threads, each for three quarters of the time; 1.4 would throttle too often.
    return allowed if quota is None else max(1, min(allowed, int(quota + 0.5)))


def cpu_quota(root: str | Path = "/") -> float | None:
    """The CPU quota in CPUs, or None where there is no limit.

    Args:
        root: Where `/proc` and the cgroup mounts are looked for.
    """
    found = []
    for version, folder in _groups(Path(root), "cpu"):
        if version == 2:
            quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        else:
            quota = _text(folder / "cpu.cfs_quota_us") or "max"
            period = _text(folder / "cpu.cfs_period_us") or ""
        if quota not in ("max", "-1") and int(period or 100_000) > 0:
            found.append(int(quota) / int(period or 100_000))
    return min(found, default=None)


def memory_available(root: str | Path = "/") -> int:
    """Bytes that can still be taken before the kernel kills something.

    The least of what the machine has available and what each cgroup on the path has left, where
    page cache that can be dropped counts as left.
    """
    available = meminfo("MemAvailable", root)
    left = [_NO_LIMIT if available is None else available]
    for limit, version, folder in _memory_limits(Path(root)):
        name, key = (
            ("memory.current", "inactive_file")
            if version == 2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        used = _text(folder / name)
        if used is None:
            continue
        reclaimable = 0
        for line in (_text(folder / "memory.stat") or "").splitlines():
            word, _, value = line.partition(" ")
            if word == key:
                reclaimable = int(value)
        left.append(limit - int(used) + reclaimable)
    return max(0, min(left))


def memory_limit(root: str | Path = "/") -> int | None:
    """Bytes that this process and those beside it may take together, or None without a limit."""
    return min((limit for limit, _, _ in _memory_limits(Path(root))), default=None)


def _memory_limits(root: Path) -> Iterator[tuple[int, int, Path]]:
    """The limits on the path, in bytes, each with its cgroup's version and folder."""
    for version, folder in _groups(root, "memory"):
        limit = _text(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        if limit is not None and limit != "max" and int(limit) < _NO_LIMIT:
            yield int(limit), version, folder


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The folders of this process's group and its ancestors that hold a controller's files."""
    mounts = dict(_mounts(root, controller))
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        version = 2 if hierarchy == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        if version not in mounts:
            continue
        mount, mounted = mounts[version]
        # A bind mount shows a part of the tree; the paths in /proc begin at the tree's root.
        inside = path.removeprefix(mounted) if f"{path}/".startswith(f"{mounted}/") else path
        folder = mount / inside.strip("/")
        while True:
            if folder.is_dir():
                yield version, folder
            if folder == mount:
                break
            folder = folder.parent


def _mounts(root: Path, controller: str) -> Iterator[tuple[int, tuple[Path, str]]]:
    """By version: where a controller's tree is mounted, and which part of it, "" for all."""
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        mounted, place = left.split(" ")[3:5]
        found = root / place.lstrip("/"), mounted.rstrip("/")
        if kind == "cgroup2":
            yield 2, found
        elif kind == "cgroup" and controller in options.split(" ")[-1].split(","):
            yield 1, found


def meminfo(key: str, root: str | Path = "/") -> int | None:
    """A line of /proc/meminfo, in bytes where it has a unit; None where there is no such line."""
    for line in (_text(Path(root) / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            number, *unit = value.split()
            return int(number) * (1024 if unit else 1)
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
