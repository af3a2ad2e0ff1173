from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from coldframe.benchmarks.batching import burst_lengths
from coldframe.runtime.engine.saturation import SIZES

Make = Callable[..., Path]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "coldframe"), "bench", "batching"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.heavy
def test_the_benchmark_runs_and_ends_in_one_document(demo_model: Make) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    model = demo_model("llama", "bfloat16")
    done = bench(model, "--runs", 2, "--prompts", 5, "--sizes", "64,1")
    assert done.returncode in (0, 1), done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    assert len(table) == len(document["rows"]) + 1
    assert document["measured"] in SIZES
    sizes = [row["name"] for row in document["rows"] if row["unit"] == "s"]
    assert len(sizes) == len({document["measured"], 1, 2048, 64})
    ratios = [row for row in document["rows"] if row["unit"] == "ratio"]
    assert len(ratios) == 2
    assert done.returncode == (0 if all(row["met"] for row in ratios) else 1)
    for row in document["rows"]:
        assert len(row["runs"]) == 2
        assert min(row["runs"]) > 0


@pytest.mark.heavy
def test_sizes_that_are_none_are_refused(demo_model: Make) -> None:
    done = bench(demo_model(), "--sizes", "64,many")
    assert done.returncode == 1
    assert "RequestError" in done.stderr
    assert "--sizes" in done.stderr


def test_prompts_are_of_all_lengths() -> None:
    lengths = burst_lengths(1000, 3)
    assert lengths == burst_lengths(1000, 3) != burst_lengths(1000, 4)
    assert 8 <= min(lengths) < 10
    assert 900 < max(lengths) <= 1000
    assert 70 < median(lengths) < 110
