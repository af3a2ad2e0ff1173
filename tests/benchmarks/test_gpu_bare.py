"""A machine that has the five packages of `make gpu` and nothing else: is that really enough?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import expected, prompt_of
from tests.support import importable

ROOT = Path(__file__).parent.parent.parent
GIVEN = ("torch", "safetensors", "transformers", "cuda-bindings", "pytest")


def with_dependencies(names: tuple[str, ...]) -> list[metadata.Distribution]:
    """What is installed of packages and all that they need."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # what another platform needs
            continue
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return list(found.values())


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with these packages, by links to those that are installed here."""
    base = tmp_path_factory.mktemp("bare")
    packages = base / "packages"
    packages.mkdir()
    for distribution in with_dependencies(GIVEN):
        place = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if (place / top).exists() and not (packages / top).exists():
                (packages / top).symlink_to(place / top)
    original = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([original, "-m", "venv", "--without-pip", base / "venv"], check=True)
    (site,) = (base / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return base / "venv" / "bin" / "python"


def make_gpu(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--silent", "gpu", f"GPU_PYTHON={python}", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_there(
    python: Path, runs: Path, place: str, *arguments: str | Path, store: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Calls `coldframe`, which is not installed there."""
    code = "import sys; from coldframe.runtime.cli import main; sys.exit(main())"
    where = {} if store is None else {"COLDFRAME_SNAPSHOT_STORE": str(store)}
    return subprocess.run(
        [python, "-P", "-c", code, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": place,
            "COLDFRAME_RUN_DIR": str(runs),
            **where,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.heavy
def test_it_has_no_more_than_these(python: Path) -> None:
    for module in ("coldframe", "fastapi", "boto3", "psutil", "xxhash", "lz4", "hypothesis"):
        done = subprocess.run(
            [python, "-c", f"import {module}"], capture_output=True, text=True, check=False
        )
        assert "ModuleNotFoundError" in done.stderr, module


@pytest.mark.heavy
def test_make_gpu_runs_there(python: Path) -> None:
    done = make_gpu(python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no GPU to measure, and so no results: ")
    required = make_gpu(python, "ARGS=--require")
    assert required.returncode != 0
    assert "Error 3" in required.stderr


@pytest.mark.heavy
def test_a_replica_answers_there(
    python: Path, demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    model, prompt = demo_model("llama", "float32"), prompt_of(40)
    told = ("-n", "8", "--ignore-eos", "--json", "--prompt-ids", ",".join(map(str, prompt)))
    done = run_there(python, no_leaks, importable(tmp_path), "run", model, *told)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == expected(model, tuple(prompt), 8)


@pytest.mark.heavy
def test_an_image_is_made_and_used_there(
    python: Path, criu: Criu, demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    """Without lz4: as it is."""
    model, prompt, store = demo_model("llama", "float32"), prompt_of(40), tmp_path / "store"
    place = importable(tmp_path)
    made = run_there(python, no_leaks, place, "snapshot", "create", model, store=store)
    assert made.returncode == 0, made.stderr
    told = ("-n", "8", "--ignore-eos", "--json", "--prompt-ids", ",".join(map(str, prompt)))
    done = run_there(
        *(python, no_leaks, place, "run", model, "--snapshot", "require", *told), store=store
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == expected(model, tuple(prompt), 8)


@pytest.mark.heavy
def test_the_tests_for_a_gpu_run_there(python: Path, tmp_path: Path) -> None:
    """On the CPU: what they need of a GPU's own is left out."""
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "t"),
            *(ROOT / "tests" / "gpu", "-k", "float32_without_overlap or two_processes"),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": importable(tmp_path),
            "COLDFRAME_TEST_DEVICE": "cpu",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
