"""A GPU, or a skip that says why there is none. All of it runs with torch and pytest alone."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model
from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import options

_CLEAR_UP_S = 10.0


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU that is tested. COLDFRAME_TEST_DEVICE names another one, or `cpu`: that is for work
    on these tests themselves, of which those that need a GPU's own memory are left out then."""
    name = os.environ.get("COLDFRAME_TEST_DEVICE", "cuda:0")
    if name != "cpu":
        found = CudaDevice(int(name.rpartition(":")[2]))
        try:
            _ = found.context
        except ColdframeError as error:
            pytest.skip(f"no GPU: {error}")
        finally:
            found.close()
    return name


@pytest.fixture
def gpu(device: str) -> Iterator[CudaDevice]:
    """The GPU in this process."""
    if device == "cpu":
        pytest.skip("a CPU has no memory of its own")
    found = CudaDevice(int(device.rpartition(":")[2]))
    yield found
    found.close()


@pytest.fixture(scope="session")
def demo_model(device: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Makes (once) a tiny demo model: `demo_model("llama", "float32")`."""
    made: dict[DemoModel, Path] = {}

    def make(family: str = "llama", dtype: str = "float32") -> Path:
        model = DemoModel("tiny", family, dtype=dtype)
        if model not in made:
            made[model] = tmp_path_factory.mktemp("demo") / f"{family}-{dtype}"
            write_demo_model(made[model], model)
        return made[model]

    return make


@pytest.fixture
def runs(device: str) -> Iterator[Path]:
    """A folder for run directories; afterwards nothing of a replica is left."""
    with _folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def shared(device: str, demo_model: Callable[..., Path]) -> Iterator[Replica]:
    """One replica for all tests of a module that may follow one another in it: to start one takes
    longer on a GPU than most tests. It serves the tiny model in float32."""
    with _folder() as folder, Replica(options(demo_model(), folder, device)) as replica:
        yield replica


@contextmanager
def _folder() -> Iterator[Path]:
    # A socket's path is short, and pytest's own folders are not.
    folder = Path(tempfile.mkdtemp(prefix="cf-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDFRAME_SNAPSHOT", "off")
        yield folder
    deadline = time.monotonic() + _CLEAR_UP_S
    while (left := _children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == [], "processes left behind"
    assert list(folder.iterdir()) == []
    folder.rmdir()


def _children() -> list[str]:
    """Command lines of this process's children that are coldframe's."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold anything; behind it are the state and the parent.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            line = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        if parent == os.getpid() and "coldframe" in line:
            found.append(line)
    return found
