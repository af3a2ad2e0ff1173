"""`coldframe serve A B`: several models behind one gateway, each from zero and back by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError

from tests.runtime.helpers import prompt_of
from tests.runtime.serving import Server, greedy, served
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
PROMPT = [5, *prompt_of(23)]
KV = 1 << 20


@pytest.fixture(scope="module")
def models(demo_model: Make) -> dict[str, Path]:
    return {name: demo_model(name, "float32") for name in ("llama", "qwen2")}


def size(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) + KV


@contextmanager
def both_served(
    models: dict[str, Path], memory: int, *flags: object, **env: str
) -> Iterator[Server]:
    first, second = models.values()
    names = [part for name in models for part in ("--model-name", name)]
    bounds = ("--device-memory", memory, "--kv-memory", KV)
    with served(first, second, *names, *bounds, *flags, **env) as server:
        yield server


def one_only(models: dict[str, Path]) -> int:
    return max(map(size, models.values()))


def room_for_both(models: dict[str, Path]) -> int:
    return sum(map(size, models.values()))


def states(server: Server, *names: str) -> list[str]:
    return [str(server.get(f"/startup?model={name}").json()["state"]) for name in names]


def ask(client: Any, name: str, count: int = 8, **more: Any) -> Any:
    return client.completions.create(
        model=name,
        prompt=PROMPT,
        max_tokens=count,
        temperature=0,
        extra_body={"ignore_eos": True},
        **more,
    )


@pytest.mark.heavy
def test_two_that_do_not_fit_together_each_answer(models: dict[str, Path]) -> None:
    want = {name: greedy(model, tuple(PROMPT), 8) for name, model in models.items()}
    with both_served(models, one_only(models)) as server, server.openai() as client:
        assert [model.id for model in client.models.list()] == list(models)
        for name in [*models, *models]:
            assert ask(client, name).choices[0].text == want[name]
        # Who names none means the first.
        assert server.complete(prompt=PROMPT, max_tokens=8, ignore_eos=True) == want["llama"]
        assert states(server, *models) == ["ready", "zero"]
        assert client.models.retrieve("qwen2").id == "qwen2"
        answer = server.post("/v1/completions", {"model": "other", "prompt": "a"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.heavy
def test_many_ask_both_at_once_and_all_are_answered(models: dict[str, Path]) -> None:
    want = {name: greedy(model, tuple(PROMPT), 8) for name, model in models.items()}
    with both_served(models, one_only(models)) as server, server.openai() as client:

        def one(number: int) -> bool:
            name = list(models)[number % 2]
            if number % 3:
                return bool(ask(client, name).choices[0].text == want[name])
            stream = ask(client, name, stream=True)
            return "".join(piece.choices[0].text for piece in stream) == want[name]

        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(one, range(48)))
        loads = server.metrics()["coldframe_coldstarts_total{fresh}"]
        assert 2 <= loads <= 24  # they take turns, but not with each request


@pytest.mark.heavy
def test_one_that_dies_leaves_the_other_alone(models: dict[str, Path]) -> None:
    want = {name: greedy(model, tuple(PROMPT), 8) for name, model in models.items()}
    with both_served(models, room_for_both(models)) as server, server.openai() as client:
        for name in models:
            ask(client, name)
        stream = ask(client, "llama", 300, stream=True)
        next(stream)
        # The second one's memory service is the one that came last.
        services = server.memory_services()
        assert len(services) == 2
        os.kill(services[-1].pid, signal.SIGKILL)
        assert ask(client, "qwen2").choices[0].text == want["qwen2"]
        assert sum(1 for _ in stream) >= 290
        assert states(server, *models) == ["ready", "ready"]


@pytest.mark.heavy
def test_each_is_put_to_sleep_by_its_name(models: dict[str, Path]) -> None:
    with both_served(models, room_for_both(models)) as server, server.openai() as client:
        for name in models:
            ask(client, name)
        assert server.post("/sleep?level=1&model=qwen2", None).status_code == 200
        assert states(server, *models) == ["ready", "parked"]
        assert server.get("/is_sleeping?model=qwen2").json() == {"is_sleeping": True}
        assert server.get("/is_sleeping").json() == {"is_sleeping": False}
        assert server.post("/sleep?level=2", None).status_code == 200
        assert states(server, *models) == ["zero", "zero"]
        assert server.get("/is_sleeping").json() == {"is_sleeping": True}
        assert server.get("/readyz").status_code == 200
        assert server.post("/wake_up?model=qwen2", None).status_code == 200
        assert states(server, *models) == ["zero", "ready"]


@pytest.mark.heavy
def test_the_first_one_is_no_model_and_the_others_are_served(
    models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    broken = {"none": tmp_path, "llama": models["llama"]}
    want = greedy(models["llama"], tuple(PROMPT), 8)
    with both_served(broken, 1 << 30) as server, server.openai(max_retries=0) as client:
        assert ask(client, "llama").choices[0].text == want
        with pytest.raises(APIStatusError) as caught:
            ask(client, "none")
        assert caught.value.status_code >= 500
        assert states(server, *broken) == ["failed", "ready"]
        assert server.get("/readyz").status_code == 200


@pytest.mark.heavy
@pytest.mark.usefixtures("criu")
def test_models_that_take_turns_get_images_all_the_same(
    models: dict[str, Path], tmp_path: Path
) -> None:
    want = {name: greedy(model, tuple(PROMPT), 8) for name, model in models.items()}
    env = {"COLDFRAME_SNAPSHOT": "auto", "COLDFRAME_SNAPSHOT_STORE": str(tmp_path / "images")}
    with (
        both_served(models, one_only(models), **env) as server,
        server.openai(timeout=120) as client,
    ):

        def from_images() -> bool:
            for name in models:
                assert ask(client, name).choices[0].text == want[name]
            return server.metrics()["coldframe_coldstarts_total{image}"] >= 2

        eventually(from_images, seconds=200)


@pytest.mark.heavy
def test_all_are_drained(models: dict[str, Path]) -> None:
    with both_served(models, room_for_both(models)) as server, server.openai() as client:
        for name in models:
            ask(client, name)
        streams = {name: ask(client, name, 200, stream=True) for name in models}
        for stream in streams.values():
            next(stream)
        server.process.send_signal(signal.SIGTERM)
        for stream in streams.values():
            assert [piece.choices[0].finish_reason for piece in stream][-1] == "length"
        eventually(lambda: server.process.poll() is not None)


@pytest.mark.heavy
def test_all_at_zero_ends_a_container_that_is_to_end(models: dict[str, Path]) -> None:
    flags = ("--idle", 0.2, "--on-idle", "exit")
    with both_served(models, room_for_both(models), *flags) as server, server.openai() as client:
        assert ask(client, "qwen2").choices[0].text
        eventually(lambda: server.process.poll() == 0, seconds=60)


@pytest.mark.heavy
def test_a_pool_is_parked_before_anybody_asks(models: dict[str, Path]) -> None:
    want = {name: greedy(model, tuple(PROMPT), 8) for name, model in models.items()}
    flags = ("--idle", 0.2, "--pool", 2)
    with both_served(models, room_for_both(models), *flags) as server, server.openai() as client:
        assert server.port
        eventually(lambda: states(server, *models) == ["parked", "parked"], seconds=60)
        for name in models:
            assert ask(client, name).choices[0].text == want[name]
        assert server.metrics()["coldframe_coldstarts_total{fresh}"] == 2
