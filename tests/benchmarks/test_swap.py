from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCH = [Path(sys.executable).parent / "coldframe", "bench", "swap"]


def test_what_cannot_be_measured_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for arguments, word in (
        ([tmp_path, tmp_path / "none"], "no such directory"),
        ([tmp_path, tmp_path, "--runs", "0"], "--runs"),
    ):
        done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert word in done.stderr


@pytest.mark.heavy
@pytest.mark.usefixtures("criu")
def test_the_benchmark_runs_and_ends_in_one_document(
    demo_model: Callable[..., Path], no_leaks: Path
) -> None:
    models = [demo_model(family, "bfloat16") for family in ("llama", "qwen3")]
    done = subprocess.run(
        [*BENCH, *models, "--runs", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    for model in models:
        zero, swap, beyond = (
            rows[f"{model.name}: {what}"]["runs"][0]
            for what in ("from zero", "in place of the other", "beyond the start")
        )
        assert min(zero, swap) > 0
        assert beyond == pytest.approx(swap - zero)
