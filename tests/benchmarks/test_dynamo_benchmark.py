from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from coldframe.benchmarks.document import SCHEMA

BENCH = [Path(sys.executable).parent / "coldframe", "bench", "dynamo"]


def test_what_cannot_be_measured_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for arguments, word in (
        ([tmp_path / "none"], "no such directory"),
        ([tmp_path, "--pairs", "0"], "--pairs"),
    ):
        done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert word in done.stderr


@pytest.mark.dynamo
def test_the_benchmark_runs_and_ends_in_one_document(demo_model: Callable[..., Path]) -> None:
    done = subprocess.run(
        [*BENCH, demo_model("llama", "bfloat16"), "--pairs", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    rows = {row["name"]: row for row in document["rows"]}
    added = rows["Dynamo's front end adds to a request"]
    assert [len(row["runs"]) for row in document["rows"]] == [3] * len(rows)
    assert done.returncode == (0 if all(row["met"] is not False for row in rows.values()) else 1)
    through, own = (
        rows[name]["runs"]
        for name in ("  through the front end", "a request for one token: at the gateway")
    )
    assert min(own) > 0
    assert len(added["runs"]) == len(through)
