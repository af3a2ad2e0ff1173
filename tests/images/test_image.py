"""The built image: what is in it, and how large it is."""

from __future__ import annotations

import marshal
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from images.wheel_sizes import BYTE_CODE, kept, normalised, read
from tests.images.building import IMAGES
from tests.images.conftest import Image
from tests.images.container import layers_of
from tests.images.contents import code_of, compiled, nobodys, requirements_unmet, site_of, tag_of

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

CHECK = [sys.executable, IMAGES / "check_budget.py"]


def test_it_serves_as_nobody_without_a_shell(image: Image) -> None:
    assert image.config["User"] == "65532:65532"
    coldframe = "/opt/coldframe/bin/coldframe"
    assert image.config["Entrypoint"] == ["/usr/bin/tini", "-s", "--", coldframe]
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
    site, tag = site_of(image), tag_of(image)
    places = (image.root / "usr/lib", image.root / "usr/local/lib")  # a distribution's, the image's
    (library,) = (p / site.parent.name for p in places if (p / site.parent.name / "os.py").exists())
    for place in (site, library):
        assert compiled(place, tag) > 500
    source = site / "coldframe/runtime/commands/serve.py"
    data = code_of(source, tag)
    assert data is not None
    if tag == sys.implementation.cache_tag:
        assert marshal.loads(data[16:]).co_filename == f"/{source.relative_to(image.root)}"


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
    release = (image.root / "etc/os-release").read_text()
    number = re.search(r'^VERSION_ID="(\d+)"$', release, re.M)
    assert number is not None
    assert "ID=debian" in release
    assert int(number[1]) >= 13  # trixie


def test_each_layer_has_what_changes_together(image: Image) -> None:
    """What is above another layer may change without it, and has nothing of it."""
    site = site_of(image).relative_to(image.root)
    layers = [found for layer in layers_of(image.root) if (found := contents(layer / site))]
    code, wheels, torch = layers  # the uppermost first
    assert code == {"coldframe", *(name for name in code if name.startswith("coldframe-"))}
    assert {"torch", "sympy"} <= torch
    assert {"fastapi", "tokenizers", "safetensors"} <= wheels
    # Of one distribution nothing is in two.
    assert not torch & wheels
    assert not code & (torch | wheels)


def test_layers_tell_nothing_of_when_they_were_built(image: Image) -> None:
    site = site_of(image)
    times = {path.lstat().st_mtime for path in site.rglob("*")}
    assert times == {0.0}


def contents(folder: Path) -> set[str]:
    """Names in a folder, but for that of modules' byte code, which several layers have."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return names - {"__pycache__"}


def test_nothing_is_there_that_nobody_asks_for(image: Image) -> None:
    """Each distribution is one that coldframe needs, by what they say themselves."""
    assert nobodys(site_of(image), ("coldframe", "s3")) == set()


def test_what_is_kept_of_wheels_is_what_is_said_of_them(image: Image) -> None:
    """The rules by which images are summed that nothing builds here, held against one that is."""
    site = site_of(image)
    prefix, python, code = site.parents[2], 0, 0
    for found in distributions(path=[str(site)]):
        for file in found.files or ():
            path = Path(os.path.normpath(str(found.locate_file(file))))
            inside = path.relative_to(prefix).as_posix()
            inside = inside.replace(f"lib/{site.parent.name}/", "", 1)
            assert kept(inside) == path.exists(), inside
            if path.suffix == ".py" and path.exists():
                python += path.stat().st_size
                code += len(code_of(path, tag_of(image)) or b"")
    assert 0.5 < code / python < BYTE_CODE


def test_wheels_hold_what_was_read_of_them(image: Image) -> None:
    """What both this image and one that nothing builds here have takes here what is said there."""
    said = {wheel.name: wheel for wheel in read("cuda")}
    common = 0
    for found in distributions(path=[str(site_of(image))]):
        wheel = said.get(normalised(found.metadata["Name"]))
        if wheel is None or wheel.version != found.version:  # torch is another build
            continue
        paths = [Path(str(found.locate_file(file))) for file in found.files or ()]
        there = sum(path.stat().st_size for path in paths if path.exists())
        # RECORD is pip's own, and so is who has installed it.
        assert abs(there - wheel.kept) < 1000 + wheel.kept / 100, (there, wheel)
        common += 1
    assert common > 30
