"""A server whose surroundings turn on it: its folder goes, descriptors are few, the clock jumps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.moments import MOMENTS, Ask, Scene
from tests.runtime.serving import Server, greedy, served
from tests.runtime.snapshots import eventually
from tests.support import unavailable

Make = Callable[..., Path]
pytestmark = pytest.mark.heavy

PROMPT = [5, *prompt_of(23)]


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


def complete(server: Server) -> str:
    return server.complete(prompt=PROMPT, max_tokens=8, ignore_eos=True)


# -- the run directory ----------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["prefill", "decode", "memory", "gateway", None])
def test_the_run_directory_is_removed_under_it(model: Path, victim: str | None) -> None:
    """As whoever clears up /tmp does it. Without a death nobody would notice."""
    with served(model, "--model-name", "demo") as server:
        want = greedy(model, tuple(PROMPT), 8)
        assert complete(server) == want
        scene = Scene(server)
        scene.settle()
        asked: list[Ask] = []

        def begin() -> int:
            asked.append(Ask(server, PROMPT, 200, stream=False, retries=5))
            return 1

        with MOMENTS["in mid-stream"](scene, begin):
            (folder,) = server.runs.iterdir()
            shutil.rmtree(folder)
            if victim is not None:
                scene.kill(victim)
        assert (asked[0].wait().error, asked[0].text) == (None, asked[0].wanted(model))
        assert complete(server) == want
        if victim in ("prefill", "decode", "memory"):
            # There is another one, with all that belongs there.
            scene.nothing_leaks()
            assert folder not in server.runs.iterdir()
        if victim in ("prefill", "decode"):
            assert "somebody has removed the run directory" in server.log


# -- few descriptors ------------------------------------------------------------------------------


def test_few_descriptors_mean_few_connections_and_nothing_worse(model: Path) -> None:
    few = ("prlimit", "--nofile=64:64")
    if shutil.which(few[0]) is None:
        unavailable("there is no prlimit")
    with served(model, "--model-name", "demo", under=few) as server:
        want = greedy(model, tuple(PROMPT), 8)
        assert complete(server) == want
        scene = Scene(server)
        scene.settle()
        with ExitStack() as crowd:
            for _ in range(50):
                crowd.enter_context(server.connect())
            with suppress(httpx.TransportError):  # beyond those that are told so
                assert server.post("/v1/completions", {"prompt": "Once"}).status_code == 503
        asked = [Ask(server, PROMPT, 8, stream=True, retries=5) for _ in range(8)]
        assert [(ask.wait().error, ask.text) for ask in asked] == [(None, want)] * 8
        assert "out of system resource" not in server.log
        for victim in ("prefill", "decode", "memory", "gateway"):
            scene.kill(victim)
            assert complete(server) == want
        scene.nothing_leaks()


# -- the wall clock -------------------------------------------------------------------------------

JUMPS = """
import itertools, time

hours = itertools.cycle((1, -1))
for name, unit in (("time", 1), ("time_ns", 10**9)):
    def jumping(clock=getattr(time, name), hour=3600 * unit):
        return clock() + next(hours) * hour
    setattr(time, name, jumping)
"""
"""A clock that is an hour ahead and an hour behind, in turn."""


def test_the_clock_jumps_an_hour_back_and_forth(model: Path, tmp_path: Path) -> None:
    """In the front, the gateway and the workers, whenever one of them looks at it."""
    (tmp_path / "sitecustomize.py").write_text(JUMPS)
    flags = ("--model-name", "demo", "--idle", "0.5", "--throttle", "2MB/s")
    with served(model, *flags, PYTHONPATH=str(tmp_path)) as server:
        scene = Scene(server)
        asked: list[Ask] = []

        def begin() -> int:
            asked.append(Ask(server, PROMPT, 200, stream=True, retries=0))
            return 1

        for victim in ("prefill", "decode"):
            with MOMENTS["from zero, in mid-load"](scene, begin):
                scene.kill(victim)
            assert (asked[-1].wait().error, asked[-1].text) == (None, asked[-1].wanted(model))
            eventually(lambda: server.get("/startup").json()["state"] == "zero")
        hours = {json.loads(line)["time"][11:13] for line in server.log.splitlines()}
        assert len(hours) > 1
