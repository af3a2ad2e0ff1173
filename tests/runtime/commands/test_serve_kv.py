"""`coldframe serve --kv-store`: prefixes that outlive rests and deaths, as clients see it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.serving import Server, greedy, served
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Make = Callable[..., Path]
STORED = "coldframe_kv_store_stored_blocks_total{disk}"
PROMPT = [5, *prompt_of(99)]


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


def ask(server: Server, model: Path) -> int:
    """Asks for what Transformers says, too: how many tokens of the prompt were there."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = server.post("/v1/completions", {**body, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["choices"][0]["text"] == greedy(model, tuple(PROMPT), 8)
    cached: int = document["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def sleep(server: Server, level: int) -> None:
    assert server.post(f"/sleep?level={level}", {}).status_code == 200
    wanted = "parked" if level == 1 else "zero"
    eventually(lambda: server.get("/startup").json()["state"] == wanted, seconds=60)


def test_a_prefix_survives_rests(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "kv"
    with served(model, "--kv-store", store, "--kv-store-memory", "64MiB") as server:
        assert ask(server, model) == 0
        assert ask(server, model) == 96
        eventually(lambda: server.metrics()[STORED] == 3, seconds=60)
        sleep(server, 2)
        assert ask(server, model) == 96
        sleep(server, 1)
        assert ask(server, model) == 96
        loaded = "coldframe_kv_store_loaded_blocks_total{memory}"
        eventually(lambda: server.metrics()[loaded] == 3, seconds=60)
        numbers = server.metrics()
        assert numbers["coldframe_kv_store_loaded_blocks_total{disk}"] == 3
        assert numbers[STORED] == 3
        assert numbers["coldframe_kv_store_bytes{disk}"] > 0
        assert numbers["coldframe_kv_store_bytes{memory}"] > 0
        assert numbers["coldframe_kv_store_lost_blocks_total{corrupt}"] == 0
        assert numbers["coldframe_kv_store_pauses_total"] == 0
        assert numbers["coldframe_kv_store_paused"] == 0
    for place in (store, *store.rglob("*")):
        assert place.stat().st_mode & 0o077 == 0
        assert place.stat().st_uid == os.getuid()


def test_a_prefix_survives_a_kill_of_all_processes(model: Path, tmp_path: Path) -> None:
    with served(model, "--kv-store", tmp_path / "kv") as server:
        assert ask(server, model) == 0
        eventually(lambda: server.metrics()[STORED] == 3, seconds=60)
        front = psutil.Process(server.process.pid)
        left = front.children(recursive=True)
        for process in [front, *left]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.process.wait(30)
        psutil.wait_procs(left, timeout=30)
        for place in server.runs.iterdir():  # which the next start would sweep away
            shutil.rmtree(place)
        server.ends_with = (-signal.SIGKILL,)
        with served(model, "--kv-store", tmp_path / "kv") as other:
            assert ask(other, model) == 96


def test_the_memory_service_dies_and_the_prefix_stays(model: Path, tmp_path: Path) -> None:
    with served(model, "--kv-store", tmp_path / "kv") as server:
        assert ask(server, model) == 0
        eventually(lambda: server.metrics()[STORED] == 3, seconds=60)
        (memory,) = server._children("loader.memory_service.service")
        memory.kill()
        eventually(lambda: "died" in server.log, seconds=60)
        assert ask(server, model) == 96
