"""Small demo models, made once, and a check that tests leave no process behind."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from coldframe.loader.cgroup import cpu_count, memory_available
from coldframe.loader.errors import SnapshotError
from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model
from coldframe.snapshot.criu import Criu
from tests.support import held_in_memory, unavailable
from tests.turns import Turns

# Tests start a thousand interpreters: each would compile what it imports, and pytest all of its own
# files once more, where the user's environment keeps Python from storing that.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# What is measured here means nothing, so that it need not be measured as after a time at zero.
os.environ["COLDFRAME_AT_ZERO"] = "0"
sys.dont_write_bytecode = False

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_MOST_PROCESSES = 4
_PROCESS_BYTES = 4 << 30
"""Of one that runs tests: torch and Transformers are in it, and replicas beside it."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The processes of `-n auto`: as many as there are cores and memory for."""
    return max(1, min(_MOST_PROCESSES, cpu_count(), memory_available() // _PROCESS_BYTES))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One of several processes learns of its turns, and has its files below a short path."""
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is None:
        return
    given = Path(config.option.basetemp)  # .../popen-gw0: too long for the sockets below it
    config.option.basetemp = str(given.with_name(worker["workerid"].removeprefix("gw")))
    config.pluginmanager.register(Turns(given.parent))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests are made, and stay: the collector would walk them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Children can be interrupted, also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _fresh_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers start fresh and on the CPU where a test does not ask, and nobody's own images are
    touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDFRAME_SNAPSHOT", "off")
        patch.setenv("COLDFRAME_DEVICE", "cpu")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes (once) a demo model: `demo_model(family="llama", dtype="float32")`."""
    made: dict[DemoModel, Path] = {}

    def make(family: str = "llama", dtype: str = "float32", size: str = "tiny") -> Path:
        model = DemoModel(size=size, family=family, dtype=dtype)
        if model not in made:
            path = tmp_path_factory.mktemp("demo") / f"{size}-{family}-{dtype}"
            write_demo_model(path, model)
            made[model] = path
        return made[model]

    return make


@pytest.fixture
def in_memory() -> Iterator[Callable[[Path], Path]]:
    """Holds a folder's files in the page cache until the test's end, and gives the folder back.

    Whoever wants to see them mapped takes it; nobody can evict them meanwhile.
    """
    with ExitStack() as stack:

        def hold(folder: Path) -> Path:
            stack.enter_context(held_in_memory(folder))
            return folder

        yield hold


@pytest.fixture(scope="session")
def criu() -> Criu:
    """A CRIU that works here. Where there is none, tests are skipped; in CI they fail."""
    try:
        found = Criu.find()
        found.check()
    except SnapshotError as error:
        unavailable(str(error))
    return found


@pytest.fixture
def no_leaks() -> Iterator[Path]:
    """A folder for run directories; afterwards no child, directory or shared memory is left."""
    # A socket's path is short, and pytest's own folders are not.
    runs = Path(tempfile.mkdtemp(prefix="cf-"))
    before = set(psutil.Process().children(recursive=True))  # what tests share
    yield runs
    after = set(psutil.Process().children(recursive=True))
    left = [child for child in after - before if _ours(child)]
    assert not left, f"processes left behind: {left}"
    assert list(runs.iterdir()) == []
    runs.rmdir()


def _ours(process: psutil.Process) -> bool:
    try:
        return "coldframe" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
