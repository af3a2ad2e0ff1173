from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., Path]


def bench(runs: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "coldframe"), "bench", "turns"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(runs)},
        check=False,
    )


@pytest.mark.heavy
def test_the_benchmark_runs_and_ends_in_one_document(demo_model: Make, no_leaks: Path) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    done = bench(
        no_leaks,
        demo_model("llama", "bfloat16"),
        *("--runs", 1, "--long", 800, "--prefix", 300, "--rest", 20, "--decodes", 2),
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    assert len(table) == len(document["rows"]) + 1
    ways = [row["name"] for row in document["rows"] if not row["name"].startswith(" ")]
    assert [name.partition(":")[0] for name in ways] == ["--local-prefill 0", "--local-prefill 64"]
    by_decode = [row["median"] for row in document["rows"] if "by the decode" in row["name"]]
    assert by_decode[0] == 0
    for row in document["rows"]:
        assert len(row["runs"]) == 1
        assert row["median"] > 0 or row["unit"] == "count"


@pytest.mark.heavy
def test_prompts_that_do_not_fit_are_refused(demo_model: Make, no_leaks: Path) -> None:
    done = bench(no_leaks, demo_model(), "--long", 1_000_000)
    assert done.returncode == 1
    assert "RequestError" in done.stderr
    assert "--long" in done.stderr
