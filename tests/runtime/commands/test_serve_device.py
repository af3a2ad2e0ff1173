"""`coldframe serve` on a GPU that it cannot use: an error, or the CPU, as it was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.replica import launch
from coldframe.runtime.start import early
from tests.runtime.emulated import emulate
from tests.runtime.serving import Server, everything, greedy, ids_of, request, served, status
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.heavy

LOOKS_LIKE_ONE = {
    "coldframe.runtime.machine.device_choice._CONTROL": "dev/null",
    "coldframe.runtime.machine.device_choice._GPU": "null",
    "coldframe.runtime.machine.device_choice._CPU_TORCH": "no torch ends so",
}
NO_SUCH_GPU = "99"
"""What hides all GPUs from the driver, and looks like one to the front."""


@pytest.fixture
def model(demo_model: Callable[..., Path]) -> Path:
    return demo_model("llama", "float32")


def test_one_that_was_asked_for_is_an_error_for_all(model: Path) -> None:
    asked = ("--device", "cuda:0", "--model-name", "demo")
    with served(model, *asked, CUDA_VISIBLE_DEVICES=NO_SUCH_GPU) as server:
        server.ends_with = (1,)
        with server.connect() as sock:
            sock.sendall(request("/v1/completions", b'{"prompt": "a", "max_tokens": 2}'))
            answer = everything(sock)
        assert status(answer) in (500, 503), answer
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["type"] == "server_error"
        assert server.process.wait(20) == 1
        assert "coldframe: NoDevice: " in server.log


def test_where_nobody_has_named_one_the_cpu_answers(model: Path) -> None:
    env = {"COLDFRAME_DEVICE": "auto", "CUDA_VISIBLE_DEVICES": NO_SUCH_GPU}
    with served(model, "--idle", 0.3, front=LOOKS_LIKE_ONE, **env) as server:
        answer = greedy(model, ids_of(model, "Once"), 6)
        for _ in range(2):
            assert server.complete(max_tokens=6, ignore_eos=True) == answer
            startup = server.get("/startup").json()
            assert startup["device"] in ("cpu", None)  # which it is at zero
            eventually(lambda: server.get("/startup").json()["state"] == "zero")
        found = server.metrics()
        # The second start knew, and did not ask for what is not there.
        assert found["coldframe_device_faults_total{fallback}"] == 1
        assert found["coldframe_device_seconds_total{cpu,used}"] > 0
        assert found["coldframe_device_seconds_total{cuda:0,idle}"] >= 0
        assert server.log.count("fell back to the CPU") == 1


def emulated(memory: int) -> dict[str, object]:
    """Constants of a front whose children find an emulated GPU."""
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch, memory={"memory": memory}, worker={"memory": memory})
        entries = {
            "coldframe.runtime.start.early._MAIN": early._MAIN,
            "coldframe.runtime.replica.launch._WORKER": launch._WORKER,
        }
    return dict(entries)


def states(server: Server) -> dict[str, str]:
    models = server.get("/startup").json()["models"]
    return {name: told["state"] for name, told in models.items()}


def test_models_share_a_gpu_whose_size_shows_with_the_first(model: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.symlink_to(model)
    # Contexts are reckoned with 512 MiB for each worker: there is room for one model at a time.
    asked = (two, "--model-name", "one,two", "--device", "cuda:0")
    with served(model, *asked, front=emulated(2 << 30)) as server:
        answer = greedy(model, ids_of(model, "Once"), 6)
        for name in ("one", "two", "one"):
            assert server.complete(model=name, max_tokens=6, ignore_eos=True) == answer
            other = {"one": "two", "two": "one"}[name]
            eventually(lambda: states(server) == {name: "ready", other: "zero"})  # noqa: B023
            startup = server.get(f"/startup?model={name}").json()
            assert (startup["device"], startup["device_why"]) == ("cuda:0", None)
        found = server.metrics()
        assert found["coldframe_device_seconds_total{cuda:0,used}"] > 0
        assert not any("cpu" in name for name in found)


def test_models_that_fit_a_gpu_together_stay_there(model: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.symlink_to(model)
    asked = (two, "--model-name", "one,two", "--device", "cuda:0", "--kv-memory", "64MiB")
    with served(model, *asked, front=emulated(8 << 30)) as server:
        answer = greedy(model, ids_of(model, "Once"), 6)
        for name in ("one", "two", "one"):
            assert server.complete(model=name, max_tokens=6, ignore_eos=True) == answer
        eventually(lambda: states(server) == {"one": "ready", "two": "ready"})


def test_more_than_the_gpu_has_cannot_be_shared(model: Path) -> None:
    asked = ("--device", "cuda:0", "--device-memory", "16GiB", "--kv-memory", "64MiB")
    with served(model, *asked, front=emulated(8 << 30)) as server:
        server.ends_with = (1,)
        assert server.process.wait(60) == 1
        assert "coldframe: DeviceError: the models are to share more memory than" in server.log


def test_a_server_that_rests_says_that_its_contexts_have_left_and_ends_as_it_is_told(
    model: Path,
) -> None:
    asked = ("--device", "cuda:0", "--kv-memory", "64MiB", "--idle", 0.2, "--park", 60)
    with served(model, *asked, front=emulated(8 << 30)) as server:
        answer = greedy(model, ids_of(model, "Once"), 6)
        for _ in range(2):
            assert server.complete(max_tokens=6, ignore_eos=True) == answer
            eventually(lambda: (server.get("/startup").json()["contexts"] or {}).get("away") == 2)
        told = server.get("/startup").json()
        assert (told["state"], told["contexts"]["why"]) == ("parked", None)
    # By SIGTERM, with status 0, and nobody is left.


def test_contexts_stay_where_they_are_told_to(model: Path) -> None:
    asked = ("--device", "cuda:0", "--kv-memory", "64MiB", "--idle", 0.2, "--park", 60)
    with served(model, *asked, "--checkpoint", "off", front=emulated(8 << 30)) as server:
        server.complete(max_tokens=6, ignore_eos=True)
        eventually(lambda: server.get("/startup").json()["state"] == "parked")
        told = server.get("/startup").json()["contexts"]
        assert told == {"away": 0, "of": 2, "bytes": 0, "seconds": 0.0, "why": "--checkpoint off"}
