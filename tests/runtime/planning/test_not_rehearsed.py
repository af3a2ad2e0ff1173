"""Where no start can be rehearsed, the plan says why, and all else of it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.planning import target
from coldframe.runtime.planning.kept import Kept
from coldframe.runtime.planning.rates import _gpu
from coldframe.runtime.planning.table import plan_table
from coldframe.runtime.planning.target import Target, kernel_module
from tests.support import without_settings

Make = Callable[..., Path]

# As the command does it, but for the import of torch, of which other tests are.
_PLAN = """
import sys, tempfile
from coldframe.runtime.commands import plan as plan_command
from coldframe.runtime.cli import main
plan_command._worker_start_s = lambda: 1.0
tempfile._candidate_tempdir_list = lambda: sys.argv[1].split(":")
sys.exit(main(sys.argv[2:]))
"""


def plan(model: Path, temporary: Path) -> tuple[dict[str, Any], str]:
    """The document, and what is said beside it."""
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(temporary), "plan", str(model), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**without_settings(), "XDG_CACHE_HOME": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["memory"]["overhead_source"] == "assumed"
    assert document["predicted_ttft_s"] >= 1.0
    assert {s["ttft_s"] for s in document["starts"]} == {None}
    assert "no start could be rehearsed" in done.stderr
    return document, done.stderr


def test_without_a_place_for_files(demo_model: Make, tmp_path: Path) -> None:
    document, said = plan(demo_model("llama", "bfloat16"), tmp_path / "nowhere")
    assert "No usable temporary directory" in said
    # None of any other kind was either, and people read the same.
    for start in document["starts"]:
        assert "No usable temporary directory" in start["why"] or (
            start["why"] == "a run ends with its answer"
        )
    assert "no start can be told: [Errno 2] No usable temporary directory" in plan_table(document)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"eos_token_id": [{}]}'])
def test_a_generation_config_that_is_none(content: str, tmp_path: Path) -> None:
    from coldframe.loader.errors import CheckpointError
    from coldframe.runtime.planning.scale_model import _object, _within

    path = tmp_path / "generation_config.json"
    path.write_text(content)
    if content.startswith("{") and content != "{":
        assert _within(_object(path)["eos_token_id"], 100) is None
    else:
        with pytest.raises(CheckpointError, match="small file of the model"):
            _object(path)


# -- what is kept of a GPU ------------------------------------------------------------------------


def test_rates_of_one_gpu_are_not_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"device": "cuda:0", "name": "A GPU", "total": 80 << 30, "driver": "13.0", "free": 1}
    others = [{"name": "B GPU"}, {"total": 40 << 30}, {"driver": "13.1"}, {"kernel_module": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    paths = {Kept(_gpu(each), str(tmp_path)).path for each in (gpu, {**gpu, "free": 2})}
    assert len(paths) == 1
    paths |= {Kept(_gpu({**gpu, **other}), str(tmp_path)).path for other in others}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    paths.add(Kept(_gpu(gpu), str(tmp_path)).path)
    assert len(paths) == 6


def test_the_driver_is_told_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = {"device": "cuda:0", "name": "A GPU", "error": None, "free": 1, "total": 2}
    told = json.dumps({"error": None, "driver": "13.0", "gpus": [gpu]}).encode()
    monkeypatch.setattr(target, "ENTRY", f"import os; os.write(3, {told!r})")
    found = Target.of(target.DeviceChoice("cuda:0")).gpu
    assert found is not None
    assert found["driver"] == "13.0"
    version = tmp_path / "proc/driver/nvidia/version"
    assert kernel_module(tmp_path) is None
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  590.48.01  Release\n")
    assert kernel_module(tmp_path) == "590.48.01"
