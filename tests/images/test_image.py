"""The built image: what is in it, and how large it is."""

from __future__ import annotations

import marshal
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.building import IMAGES, requirements_unmet
from tests.images.conftest import Image

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

CHECK = [sys.executable, IMAGES / "check_budget.py"]


def site_of(image: Image) -> Path:
    (site,) = image.root.glob("opt/coldframe/lib/python3*/site-packages")
    return site


def test_it_serves_as_nobody_without_a_shell(image: Image) -> None:
    assert image.config["User"] == "65532:65532"
    assert image.config["Entrypoint"][-1] == "/opt/coldframe/bin/coldframe"
    assert image.config["Cmd"] == ["serve"]
    assert "Volumes" not in image.config
    assert "8000/tcp" in image.config["ExposedPorts"]


def test_it_is_within_its_budget(image: Image) -> None:
    done = subprocess.run([*CHECK, "cpu", image.root], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"([0-9.]+) of that", done.stdout)
    assert found is not None
    assert 0.5 < float(found[1]) <= 1.2


def test_what_has_no_place_in_a_layer_is_refused(image: Image, tmp_path: Path) -> None:
    site = tmp_path / site_of(image).relative_to(image.root)
    for name in ("click", "coldframe"):
        (info,) = site_of(image).glob(f"{name}-*.dist-info")
        shutil.copytree(info, site / info.name)
    stray = site / "stray-1.dist-info"
    stray.mkdir()
    (stray / "METADATA").write_text("Name: stray\nVersion: 1\n")
    (stray / "RECORD").write_text("")
    words = [*CHECK, "cpu", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stray: no layer of cpu has it" in done.stderr


def test_nothing_that_is_asked_for_is_missing(image: Image) -> None:
    missing = requirements_unmet(site_of(image))
    # tokenizers has it only to download with, which nothing of ours does.
    assert all(line.startswith("tokenizers wants huggingface-hub") for line in missing), missing


def test_byte_code_is_there_and_asks_no_source(image: Image) -> None:
    site = site_of(image)
    for source in (
        "coldframe/runtime/commands/serve.py",
        "torch/nn/modules/module.py",
        "uvicorn/main.py",
    ):
        path = site / source
        assert path.is_file()
        (compiled,) = (path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc")
        data = compiled.read_bytes()
        assert int.from_bytes(data[4:8], "little") == 1  # by hash, unchecked: PEP 552
        if f"cpython-{sys.version_info[0]}{sys.version_info[1]}" in compiled.name:
            code = marshal.loads(data[16:])
            assert code.co_filename == f"/{path.relative_to(image.root)}"


def test_what_nothing_reads_is_not_there(image: Image) -> None:
    site = site_of(image)
    for name in ("torch/test", "torch/include", "torch/bin/protoc", "pip", "huggingface_hub"):
        assert not (site / name).exists(), name
    assert not any(site.rglob("*.a"))
    programs = {path.name for path in (site.parents[2] / "bin").iterdir()}
    assert {name for name in programs if "python" not in name.lower()} <= {
        "coldframe",
        *(name for name in programs if name.startswith(("activate", "Activate"))),
    }
    assert not shutil.which("gcc", path=str(image.root / "usr/bin"))


def test_criu_is_the_distributions(image: Image) -> None:
    assert any((image.root / place / "criu").exists() for place in ("usr/sbin", "usr/bin"))
    status = (image.root / "var/lib/dpkg/status").read_text()
    found = re.search(
        r"^Package: criu\nStatus: install ok installed$.*?^Version: (\d+)\.(\d+)",
        status,
        re.M | re.S,
    )
    assert found is not None
    assert (int(found[1]), int(found[2])) >= (4, 1)
