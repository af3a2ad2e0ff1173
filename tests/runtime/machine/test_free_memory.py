"""Machines that give free memory back, and the rest before a start that is measured."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.machine.free_memory import is_given_back, rest_of
from tests.runtime.planning.plans import COLDFRAME, plan


def test_the_balloon_says_whether_free_pages_go_back(tmp_path: Path) -> None:
    assert not is_given_back(str(tmp_path / "none"))
    device = tmp_path / "virtio0"
    device.mkdir()
    assert not is_given_back(str(tmp_path))
    for features, given in (("01100001", False), ("0110", False), ("", False), ("011001", True)):
        (device / "features").write_text(f"{features}\n")
        assert is_given_back(str(tmp_path)) is given
    other = tmp_path / "virtio1"
    other.mkdir()
    (other / "features").write_text("00000000")
    assert is_given_back(str(tmp_path))


def test_a_rest_is_what_is_asked_for_else_what_the_machine_needs() -> None:
    for asked in (0.0, 2.5):
        assert rest_of(argparse.Namespace(at_zero=asked)) == asked
    assert rest_of(argparse.Namespace(at_zero=None)) == (8.0 if is_given_back() else 0.0)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(RequestError, match="no such time"):
            rest_of(argparse.Namespace(at_zero=wrong))


def test_a_plan_rests_before_each_start(demo_model: Callable[..., Path], tmp_path: Path) -> None:
    began = time.monotonic()
    document = plan(tmp_path, demo_model(), "--at-zero", "1.5")
    assert document["starts"][0]["ttft_s"] > 0
    # Before a run, a run with a copy, and serve.
    assert time.monotonic() - began >= 3 * 1.5
    done = subprocess.run([COLDFRAME, "plan", "x", "--at-zero", "soon"], capture_output=True)
    assert done.returncode == 2
