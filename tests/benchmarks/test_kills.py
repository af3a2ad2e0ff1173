from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.leaks import Holdings

BENCH = [Path(sys.executable).parent / "coldframe", "bench", "kills"]
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_what_was_added_is_told_from_what_comes_and_goes() -> None:
    before = Holdings(0, 4, 20, 18.0, 40.0)
    assert before.no_more_than(before)
    assert Holdings(0, 3, 22, 20.0, 50.0).no_more_than(before)
    for more in (
        Holdings(1, 4, 20, 18.0, 40.0),
        Holdings(0, 5, 20, 18.0, 40.0),
        Holdings(0, 4, 23, 18.0, 40.0),
        Holdings(0, 4, 20, 40.0, 40.0),
        Holdings(0, 4, 20, 18.0, 60.0),
    ):
        assert not more.no_more_than(before)


@pytest.mark.heavy
def test_arrivals_are_answered_while_processes_are_killed(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    lines = [
        f"2023-11-16 18:{n // 6:02}:{n % 6 * 10:02}.000,{n * 37},{n % 40}\n" for n in range(180)
    ]
    trace.write_text(HEAD + "".join(lines))
    done = subprocess.run(
        [
            *(*BENCH, demo_model("llama", "float32"), "--trace", trace),
            *("--seconds", "12", "--take", "1", "--kill-every", "2", "--seed", "3"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row["median"] for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert rows["answered as without any kill"] == 180
    assert rows["processes killed"] > 0
