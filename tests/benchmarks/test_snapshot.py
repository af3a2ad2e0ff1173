from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.harness import evict_files
from coldframe.benchmarks.restores import files_in, read_direct_s, read_s
from coldframe.loader.checkpoints.residency import cached_bytes


def bench(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "coldframe", "bench", "snapshot", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_eviction_is_real(tmp_path: Path) -> None:
    file = tmp_path / "objects" / "one"
    file.parent.mkdir()
    file.write_bytes(os.urandom(3 << 20))
    files = files_in(tmp_path)
    assert files == [file]
    with file.open("rb") as stream:
        assert cached_bytes(stream.fileno(), 0, 3 << 20) == 3 << 20
        evict_files(files)
        assert cached_bytes(stream.fileno(), 0, 3 << 20) == 0
        assert read_direct_s(files) > 0
        assert cached_bytes(stream.fileno(), 0, 3 << 20) == 0
        assert read_s(files) > 0
        assert cached_bytes(stream.fileno(), 0, 3 << 20) == 3 << 20


def test_a_store_that_is_in_use_is_left_alone(
    demo_model: Callable[..., Path], tmp_path: Path
) -> None:
    kept = tmp_path / "mine"
    kept.write_text("mine")
    done = bench(demo_model("llama", "bfloat16"), "--snapshot-store", tmp_path)
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert list(tmp_path.iterdir()) == [kept]


def test_an_odd_number_of_clones_is_refused(demo_model: Callable[..., Path]) -> None:
    done = bench(demo_model("llama", "bfloat16"), "--clones", "3")
    assert done.returncode == 1
    assert "an even number" in done.stderr


@pytest.mark.usefixtures("criu")
@pytest.mark.heavy
def test_the_benchmark_runs_and_ends_in_one_document(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    model = demo_model("llama", "bfloat16")
    done = bench(
        *(model, "--runs", "1", "--clones", "2", "--snapshot-store", tmp_path / "images"),
        COLDFRAME_RUN_DIR=str(no_leaks),
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    rows: list[dict[str, Any]] = document["rows"]
    assert len(table) == len(rows) + 1
    met = [row["met"] for row in rows if row["target"] is not None]
    assert done.returncode == (0 if all(met) else 1)
    for row in rows:
        assert row["runs"], row["name"]
        assert all(value > 0 for value in row["runs"]), row["name"]
    found = {row["name"]: row["median"] for row in rows}
    assert found["  same tokens"] == 1
    assert found["  took part in answers"] == 2
    assert found["  answers as of fresh workers"] == 1
    # Whatever the machine: what is restored has nothing to import.
    assert found["lz4, hashed: first instruction / import"] < 1
    if not document["left_out"]:
        assert found["lz4, cold disk: first instruction"] > found["  read of what is stored"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["lz4", "raw"]
