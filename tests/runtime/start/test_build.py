"""That processes of a replica are of one build, in real interpreters that are another one's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.runtime.start.build import Build
from tests.runtime.helpers import ask, finish, prompt_of, wait_for
from tests.runtime.snapshots import eventually

ROOT = Path(__file__).parents[3]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has no packages."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def with_tree(python: Path, folder: Path, *, changed: str | None = None) -> Path:
    """The same interpreter with a copy of this package, of which one file may be another."""
    tree = folder / "coldframe"
    for package in ("loader", "runtime", "snapshot"):
        ours = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tree / package, ignore=ours)
    if changed is not None:
        with (tree / changed).open("a") as file:
            file.write("# another line\n")
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{python}" "$@"\n')
    path.chmod(0o755)
    return path


def failure(model: Path, runs: Path, python: Path | str, *, alone: bool = True) -> ColdframeError:
    """Why a replica whose vLLM that interpreter is to run cannot be."""
    vllm = VllmOptions(python=str(python), alone=alone)
    options = ReplicaOptions(str(model), run_dir=str(runs), decode=0, vllm=vllm, threads=1)
    with Replica(options) as replica:
        wait_for(replica, lambda: replica.error is not None)
        assert replica.error is not None
        return replica.error


def test_a_python_without_coldframe(demo_model: Make, no_leaks: Path, bare: Path) -> None:
    error = failure(demo_model(), no_leaks, bare)
    assert isinstance(error, PlatformError)
    assert error.where == f"--vllm-python {bare}"
    assert "exit status 1" in str(error.got)
    assert "No module named 'coldframe'" in str(error.got)


def test_what_is_no_python(demo_model: Make, no_leaks: Path) -> None:
    """An interpreter that is too old for the option which ours are started with ends so, too."""
    error = failure(demo_model(), no_leaks, "/bin/false")
    assert isinstance(error, PlatformError)
    assert error.where == "--vllm-python /bin/false"
    assert error.got == "exit status 1"


def test_what_it_has_started_ends_with_it(
    demo_model: Make, no_leaks: Path, bare: Path, tmp_path: Path
) -> None:
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(f'#!/bin/sh\nsleep 1000 &\necho $! >"{pid}"\nexec "{bare}" "$@"\n')
    python.chmod(0o755)
    failure(demo_model(), no_leaks, python)
    other = Path("/proc", pid.read_text().strip(), "stat")
    eventually(lambda: not other.exists() or other.read_text().rpartition(")")[2].split()[0] == "Z")


def test_another_coldframe(demo_model: Make, no_leaks: Path, bare: Path, tmp_path: Path) -> None:
    python = with_tree(bare, tmp_path, changed="loader/wire.py")
    error = failure(demo_model(), no_leaks, python)
    assert isinstance(error, PlatformError)
    assert str(error.where).startswith("--vllm-python ")
    assert str(Build.here()) == error.expected
    assert str(tmp_path) in str(error.got)
    assert Build.here().sources not in str(error.got)


def test_beside_native_workers_it_is_told_and_they_go_on(
    demo_model: Make, no_leaks: Path, bare: Path
) -> None:
    warnings: list[str] = []
    vllm = VllmOptions(python=str(bare))
    options = ReplicaOptions(str(demo_model()), run_dir=str(no_leaks), vllm=vllm, threads=1)
    with Replica(options, warn=warnings.append) as replica:
        before = ask(replica, prompt_of(20), 8)
        wait_for(replica, lambda: bool(warnings))
        after = ask(replica, prompt_of(20), 8)
        finish(replica, before, after)
        assert before.tokens == after.tokens
        assert replica.error is None
    assert "No module named 'coldframe'" in warnings[0]
    assert f"--vllm-python {bare}" in warnings[0]


def test_one_that_is_killed_early_is_tried_again(
    demo_model: Make, no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has killed it need not kill the next one, even where nobody else decodes."""
    monkeypatch.setattr("coldframe.runtime.replica.comebacks.AGAIN_S", 0.5)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho once >>{tmp_path}/started\nkill -9 $$\n")
    python.chmod(0o755)
    vllm = VllmOptions(python=str(python), alone=True)
    options = ReplicaOptions(
        str(demo_model()), run_dir=str(no_leaks), decode=0, vllm=vllm, threads=1
    )
    with Replica(options) as replica:
        wait_for(replica, lambda: replica.staff["vllm"]["starting"] == 0)
        assert replica.error is None
        wait_for(replica, lambda: (tmp_path / "started").read_text().count("once") == 2)


def test_a_copy_of_the_same_sources_is_the_same_build(bare: Path, tmp_path: Path) -> None:
    def of(python: Path) -> str:
        code = "from coldframe.runtime.start.build import Build; print(Build.here().sources)"
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, check=True)
        return done.stdout.decode().strip()

    here = Build.here()
    assert of(with_tree(bare, tmp_path)) == here.sources == of(Path(sys.executable))
    assert Build.from_environment(here.to_environment()) == here
