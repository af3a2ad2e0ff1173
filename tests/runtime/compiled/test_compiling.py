"""Whether a decode step is compiled for an image, and what is said where it is not."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.commands import template as template_command
from coldframe.runtime.compiled import compiler, compiling
from coldframe.runtime.compiled.compiling import SEQUENCES, Compiling
from coldframe.runtime.compiled.folder import CodeFolder, key_of
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.replica.sizing import ModelFacts
from tests.runtime.snapshots import eventually, program

DemoModels = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/coldframe/compiled"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, demo_model: DemoModels) -> ModelFacts:
    """A model that is worth it."""
    monkeypatch.setattr(compiling, "LEAST_BYTES", 0)
    return ModelFacts(str(demo_model()))


def nothing_left(root: Path) -> bool:
    return not [path for path in root.iterdir() if path.name != "lock"]


def test_a_small_model_is_not_compiled(demo_model: DemoModels, root: Path, tmp_path: Path) -> None:
    found = Compiling(ModelFacts(str(demo_model())), 2, str(tmp_path), 60)
    assert found.done
    assert found.order["folder"] is None
    assert "is fast enough" in found.order["why"]
    assert not root.exists()


def test_where_somebody_waits_only_the_cache_is_looked_at(
    large: ModelFacts, root: Path, tmp_path: Path
) -> None:
    found = Compiling(large, 2, str(tmp_path), 0)
    assert found.done
    assert "coldframe snapshot create" in found.order["why"]
    assert not root.exists()


def test_it_takes_memory(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "memory_available", lambda: 1 << 30)
    found = Compiling(large, 2, str(tmp_path), 60)
    assert found.done
    assert "1.07 GB free" in found.order["why"]


def test_what_was_found_to_be_slow_is_not_compiled_again(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = CodeShape.of_tensors(large.spec, large.tensors, 2)
    path = root / key_of(shape, SEQUENCES)
    path.mkdir(0o700, parents=True)
    CodeFolder(str(path), shape, (), "no faster than eager").write()
    found = Compiling(large, 2, str(tmp_path), 60)
    assert found.done
    assert found.order == {"folder": None, "why": "no faster than eager"}
    # But it is where somebody asks for it, and when the measurement is old.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiling, "key_of", lambda *_: path.name)
    again = Compiling(large, 2, str(tmp_path), 60, again=True)
    assert "there is no C++ compiler" in again.wait()["why"]
    os.utime(path / "step.json", (1000, 1000))
    assert "there is no C++ compiler" in Compiling(large, 2, str(tmp_path), 60).wait()["why"]


def test_without_a_compiler(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Compiling(large, 2, str(tmp_path), 60)
    assert not found.done
    assert "there is no C++ compiler" in found.wait()["why"]
    assert found.order["folder"] is None
    assert nothing_left(root)


def test_one_that_cannot_write_its_cache_compiles_for_itself(
    large: ModelFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cache").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Compiling(large, 2, str(tmp_path / "run"), 60)
    assert "there is no C++ compiler" in found.wait()["why"]
    assert nothing_left(tmp_path / "run/compiled")


@pytest.mark.parametrize("home", ["writable by others", "no place"])
def test_a_cache_that_is_not_safe_is_as_none(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if home == "no place":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    else:
        root.mkdir(parents=True)
        root.chmod(0o777)
    found = Compiling(large, 2, str(tmp_path / "run"), 60)
    assert "there is no C++ compiler" in found.wait()["why"]
    assert nothing_left(tmp_path / "run/compiled")
    assert not (tmp_path / "relative").exists()
    assert not root.exists() or not list(root.iterdir())


def test_nothing_of_a_child_that_is_killed_goes_on(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "of the creator")
    monkeypatch.setenv("CXX", "g++")
    main = (
        "import os, subprocess; subprocess.Popen(['sleep', '1000']); "
        f"open({str(tmp_path / 'names')!r}, 'w').write(' '.join(os.environ)); "
        "os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(compiling, "_MAIN", main)
    found = Compiling(large, 2, str(tmp_path), 60)
    assert found._child is not None
    group = found._child.pid
    assert "was ended" in found.wait()["why"]
    eventually(lambda: not group_of(group))
    names = (tmp_path / "names").read_text().split()
    assert "A_SECRET" not in names
    assert {"CXX", "PATH", "TMPDIR", "OMP_WAIT_POLICY"} <= set(names)
    assert nothing_left(root)


def test_a_template_loads_code_before_its_folder_goes(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Compiled(Compiling):
        def wait(self) -> dict[str, Any]:
            self.order["folder"] = self._writing  # as where there is no cache
            return self.order

        def close(self) -> None:
            seen.append(self._root)
            super().close()

    class Loaded:
        def __init__(self, *_: Any) -> None:
            assert os.path.isdir(seen[0])
            raise KeyboardInterrupt

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(template_command, "Compiling", Compiled)
    monkeypatch.setattr(template_command, "Template", Loaded)
    args = argparse.Namespace(model=large.directory, threads=1, json=False, graphs="auto")
    with pytest.raises(KeyboardInterrupt):
        template_command.run(args)
    assert not os.path.exists(seen[0])


def slow_compiler(tmp_path: Path) -> str:
    """A compiler that takes for ever: the folder that it is in, and a file where it says so."""
    folder = tmp_path / "bin"
    folder.mkdir()
    version = '[ "$1" != --version ] || { echo slow; exit; }'
    program(folder / "g++", f"{version}\necho $$ > {tmp_path}/compiler\nexec sleep 1000")
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def group_of(leader: int) -> list[int]:
    """The processes of a group that run."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == leader and running(pid):
                found.append(pid)
    return found


@pytest.mark.heavy
@pytest.mark.timeout(300)
@pytest.mark.parametrize("given_up", [True, False])
def test_a_compiler_that_takes_too_long_is_ended(
    large: ModelFacts,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given_up: bool,
) -> None:
    monkeypatch.setenv("PATH", slow_compiler(tmp_path))
    found = Compiling(large, 2, str(tmp_path), 250 if given_up else 5)
    compiler = tmp_path / "compiler"
    if given_up:
        eventually(lambda: found.done or (compiler.exists() and compiler.read_text()), 240)
        found.close()
        assert found.order["why"] == "it was given up"
    else:
        assert "took longer than 5 s" in found.wait()["why"]
    if compiler.exists():  # the machine was fast enough for that
        pid = int(compiler.read_text())
        eventually(lambda: not running(pid))
    assert nothing_left(root)


@pytest.mark.heavy
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_what_is_compiled_is_tried_and_kept(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "SEQUENCES", (1,))
    monkeypatch.setenv("CXX", "env g++")  # of several words, as with ccache
    first = Compiling(large, 1, str(tmp_path), 300)
    assert not first.done
    order = first.wait()
    # How much faster it is depends on who else is here; that it has been tried does not.
    said = r"\d+\.\d\dx \(1 sequence(, up to \d+ tokens)?\) the speed of eager, 1 thread"
    assert re.fullmatch(f"(compiled|not fast enough); {said}", order["why"]), order["why"]
    again = Compiling(large, 1, str(tmp_path), 0)
    assert again.done
    assert again.order == order
    shape = CodeShape.of_tensors(large.spec, large.tensors, 1)
    path = root / key_of(shape, (1,))
    kept = ["layer-1.so", "logits-1.so"] if order["folder"] else []
    assert order["folder"] in (None, str(path))
    assert sorted(os.listdir(path)) == [*kept, "step.json"]
    assert sorted(os.listdir(root)) == [path.name, "lock"]


@pytest.mark.heavy
def test_a_child_that_is_killed(
    large: ModelFacts, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", slow_compiler(tmp_path))
    found = Compiling(large, 2, str(tmp_path), 60)
    assert found._child is not None
    group, compiler = found._child.pid, tmp_path / "compiler"
    eventually(lambda: found.done or (compiler.exists() and compiler.read_text()), 60)
    os.kill(group, 9)
    assert "was ended" in found.wait()["why"]
    eventually(lambda: not group_of(group))
    assert nothing_left(root)


def test_what_a_compiler_says_is_told_on_one_line() -> None:
    said = (
        "C++ compile error\n\nCommand:\ng++ -x c++-header /tmp/a.h -o /tmp/a.h.gch\n\nOutput:\n"
        "In file included from /a/vec.h:5:\n/a/sleef.h:191:10: warning: anonymous structs\n"
        "/a/cpp_prefix.h:1490:2: fatal error: cannot write PCH file: No space left on device\n"
    )
    found = compiler._why(RuntimeError(said))
    assert found == (
        "RuntimeError: C++ compile error: cannot write PCH file: No space left on device"
    )
    assert compiler._why(ValueError("no such thing\nat all")) == "ValueError: no such thing"
