"""Cores of their own: a fair cut, kept by every thread that computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coldframe.loader.errors import DeviceError
from coldframe.runtime.machine.cores import keep_to, split_cores, to_environment
from tests.support import unavailable


def machine(root: Path, places: dict[int, tuple[int, int]]) -> Path:
    """What the kernel says of a machine: core by core its socket and its physical core."""
    for core, (package, physical) in places.items():
        folder = root / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{physical}\n")
    return root


def test_two_cores_are_one_each(tmp_path: Path) -> None:
    assert split_cores([0, 1], machine(tmp_path, {0: (0, 0), 1: (0, 1)})) == ((0,), (1,))


def test_threads_of_one_core_stay_together(tmp_path: Path) -> None:
    # As Linux counts them: first one thread of each core, then the other.
    places = {core: (0, core % 4) for core in range(8)}
    halves = split_cores(range(8), machine(tmp_path, places))
    assert halves == ((0, 4, 1, 5), (2, 6, 3, 7))


def test_sockets_stay_together(tmp_path: Path) -> None:
    places = {core: (core % 2, core // 2) for core in range(8)}
    halves = split_cores(range(8), machine(tmp_path, places))
    assert halves == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_an_odd_core_is_nobodys_loss(tmp_path: Path) -> None:
    places = {core: (0, core // 2) for core in range(6)}
    first, second = split_cores(range(6), machine(tmp_path, places))
    # Three physical cores of two threads each: one half has two of them, none is shared.
    assert sorted(map(len, (first, second))) == [2, 4]
    assert {core // 2 for core in first}.isdisjoint(core // 2 for core in second)


def test_two_threads_of_one_core_are_cut_all_the_same(tmp_path: Path) -> None:
    assert split_cores([3, 2], machine(tmp_path, {2: (0, 0), 3: (0, 0)})) == ((2,), (3,))


def test_a_machine_that_says_nothing_is_cut_by_numbers(tmp_path: Path) -> None:
    assert split_cores([0, 1, 2, 3], tmp_path / "nowhere") == ((0, 1), (2, 3))


@pytest.mark.parametrize("cores", [[], [7]])
def test_one_core_cannot_be_cut(cores: list[int], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="not cores enough") as raised:
        split_cores(cores, tmp_path)
    assert raised.value.got == str(len(cores))


def test_a_process_keeps_to_its_cores_with_the_threads_that_it_has_and_gets() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        unavailable("there is one core")
    code = (
        "import os, sys, threading\n"
        "from coldframe.runtime.machine.cores import keep_to\n"
        "gate = threading.Event()\n"
        "before = threading.Thread(target=gate.wait)\n"
        "before.start()\n"
        "keep_to(sys.argv[1])\n"
        "behind = threading.Thread(target=gate.wait)\n"
        "behind.start()\n"
        "for thread in threading.enumerate():\n"
        "    print(*os.sched_getaffinity(thread.native_id))\n"
        "gate.set()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, to_environment(allowed[1:])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [" ".join(map(str, allowed[1:]))] * 3


@pytest.mark.parametrize("cores", [None, ""])
def test_who_has_none_goes_wherever_it_may(cores: str | None) -> None:
    before = os.sched_getaffinity(0)
    keep_to(cores)
    assert os.sched_getaffinity(0) == before
    assert to_environment(()) == ""


@pytest.mark.parametrize("cores", ["x", "1000000", "0,", "-1"])
def test_cores_that_cannot_be_had_are_an_error(cores: str) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(DeviceError, match="cannot keep to its cores"):
        keep_to(cores)
    assert os.sched_getaffinity(0) == before
