"""The check of what layers take, over wheels made for it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.images.building import IMAGES

MB = 1_000_000


def wheel(folder: Path, name: str, nbytes: int, *needs: str) -> None:
    """A wheel whose files take so many bytes, and a few for what it says of itself."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    path = folder / f"{name.replace('-', '_')}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/data", bytes(nbytes))
        archive.writestr(f"{name}-1.dist-info/METADATA", "\n".join(lines) + "\n")


def checked(folder: Path, image: str = "cpu") -> tuple[int, str]:
    words = [sys.executable, IMAGES / "check_budget.py", image, "--wheels", folder]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wheel(tmp_path, "torch", 20 * MB, "sympy>=1", "nowhere; extra == 'x'")
    wheel(tmp_path, "sympy", 3 * MB, "mpmath")
    wheel(tmp_path, "mpmath", 2 * MB)
    wheel(tmp_path, "pydantic-core", 5 * MB)
    wheel(tmp_path, "coldframe", MB, "torch")
    return tmp_path


def test_wheels_within_it(folder: Path) -> None:
    status, said = checked(folder)
    assert status == 0, said
    rows = {line.split()[0]: line.split()[1] for line in said.splitlines()}
    assert (rows["torch"], rows["wheels"], rows["code"]) == ("25.0", "5.0", "1.0")
    assert "torch and its own needs 25.0 MB" in said


def test_a_layer_that_takes_more_is_refused(folder: Path) -> None:
    wheel(folder, "coldframe", 17 * MB)
    status, said = checked(folder)
    assert status == 1
    assert "code: 17.0 MB are more than 16 MB" in said


def test_what_no_layer_is_made_of_is_refused(folder: Path) -> None:
    wheel(folder, "stray", MB)
    status, said = checked(folder)
    assert status == 1
    assert "stray: no layer of cpu has it" in said
    # Elsewhere NVIDIA's libraries have one, and here not.
    (folder / "stray-1-py3-none-any.whl").unlink()
    wheel(folder, "nvidia-cublas", MB)
    assert "nvidia-cublas: no layer of cpu has it" in checked(folder)[1]
    assert "nvidia-cublas" not in checked(folder, "cuda")[1]
