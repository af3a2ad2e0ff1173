from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.pacing import Load, Pace, Phase, prompt_ids
from tests.support import unavailable

Make = Callable[..., Path]


@pytest.mark.heavy
def test_the_benchmark_runs_and_ends_in_one_document(demo_model: Make, no_leaks: Path) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    if len(os.sched_getaffinity(0)) < 2:
        unavailable("there is one core")
    command = [Path(sys.executable).parent / "coldframe", "bench", "interference"]
    done = subprocess.run(
        [*command, demo_model(), "--runs", "1", "--prompt-tokens", "300", "--prompts", "4"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    assert len(table) == len(document["rows"]) + 1
    assert done.returncode == (0 if all(r["met"] in (None, True) for r in document["rows"]) else 1)
    assert document["prompt_tokens"] == 300
    ways = [row["name"] for row in document["rows"] if not row["name"].startswith(" ")]
    assert [name.partition(":")[0] for name in ways] == ["pinned", "apart", "together"]
    for row in document["rows"]:
        assert len(row["runs"]) == 1
        assert row["median"] >= 0 if row["unit"] == "% of time" else row["median"] > 0
    assert [row["target"] for row in document["rows"] if row["target"]] == [1.5]


@pytest.mark.heavy
def test_prompts_that_do_not_fit_are_refused(demo_model: Make, no_leaks: Path) -> None:
    command = [Path(sys.executable).parent / "coldframe", "bench", "interference"]
    done = subprocess.run(
        [*command, demo_model(), "--prompt-tokens", "1000000"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode == 1
    assert "RequestError" in done.stderr
    assert "--prompt-tokens" in done.stderr


def test_percentiles_are_gaps_that_were_there() -> None:
    phase = Phase([number / 1e3 for number in range(1, 201)])
    assert [phase.percentile_ms(p) for p in (0, 50, 99, 100)] == [1, 100, 198, 200]
    assert Phase([0.005]).percentile_ms(99) == 5


def test_prompts_have_nothing_in_common() -> None:
    prompts = {prompt_ids(64, seed, 500) for seed in range(50)}
    assert len({prompt[:8] for prompt in prompts}) == 50
    assert all(0 <= token < 500 for prompt in prompts for token in prompt)
    assert prompt_ids(64, 7, 500) == prompt_ids(64, 7, 500)
    assert len(Load(8, 2000).short(1, 500)) + Load(8, 2000).decode_tokens(1024) == 1024


def test_prompts_are_due_whether_or_not_those_before_are_answered() -> None:
    pace = Pace(100.0, 0.01, os.getpid())
    time.sleep(0.026)
    numbers = []
    while pace.due:
        numbers.append(pace.take())
    assert numbers[:3] == [0, 1, 2]
    assert pace.wait_s <= 0.01
    for number in (0, 1):
        pace.answered(number)
    first, second = pace.phase.ttft_s
    assert first - second <= 0.0101  # the second came a hundredth later
    assert not pace.over


def test_gaps_are_those_of_each_stream() -> None:
    pace = Pace(0.0, None, os.getpid())
    for stream in ("a", "b", "a", "a", "b"):
        pace.token(stream)
    phase = pace.close()
    assert len(phase.gaps_s) == 3
    assert min(phase.gaps_s) >= 0
    assert pace.over
    assert not pace.due
    assert phase.waited >= 0
