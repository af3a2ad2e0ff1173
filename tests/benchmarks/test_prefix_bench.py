from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_the_benchmark_runs_and_ends_in_one_document(
    demo_model: Callable[..., Path], no_leaks: Path
) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    command = [Path(sys.executable).parent / "coldframe", "bench", "prefix"]
    done = subprocess.run(
        [*command, demo_model("llama", "bfloat16"), "--runs", "1", "--prefix", "300"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks), "COLDFRAME_TIER": "fresh"},
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    assert len(table) == len(document["rows"]) + 1
    assert (document["prefix_tokens"], document["rest_tokens"]) == (300, 16)
    met = [row["met"] for row in document["rows"] if row["target"] is not None]
    assert done.returncode == (0 if all(met) else 1)
    for row in document["rows"]:
        assert len(row["runs"]) == 1
        assert min(row["runs"]) <= row["median"] <= max(row["runs"])
