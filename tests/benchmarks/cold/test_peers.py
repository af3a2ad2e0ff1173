from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from coldframe.benchmarks.cold.contender import CONTENDERS, Asked
from coldframe.benchmarks.cold.peers import PEERS, open_contender
from coldframe.benchmarks.servers import knock_at, plain_server
from coldframe.loader.errors import PlatformError

Make = Callable[..., Path]
PROMPT = [5 + (7 * i) % 400 for i in range(24)]


@pytest.fixture(scope="module")
def expected(demo_model: Make) -> tuple[int, ...]:
    """Greedy tokens by Transformers' logits, step by step and without `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model("qwen3", "float32"), dtype="auto")
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(PROMPT) :])


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "through"), [("transformers", "run"), ("fastapi", "http")])
def test_a_peer_is_started_and_gives_greedy_tokens(
    name: str, through: str, demo_model: Make, expected: tuple[int, ...]
) -> None:
    peer = open_contender(name, Asked(demo_model("qwen3", "float32"), PROMPT, 6))
    assert (peer.name, peer.through) == (name, through)
    outcome = peer.start()
    assert outcome.tokens == expected
    # An interpreter that imports torch takes longer than this on any machine.
    assert 0.1 < outcome.ttft_s < outcome.last_token_s
    assert outcome.memory is not None
    assert outcome.memory > 100 << 20


@pytest.mark.heavy
def test_a_peer_that_fails_says_why(demo_model: Make, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text((demo_model() / "config.json").read_text())
    asked = Asked(broken, PROMPT, 6, limit_s=120.0)
    with pytest.raises(PlatformError, match=r"(?s)got 0; it said: .*safetensors") as script:
        open_contender("transformers", asked).start()
    assert "plain_script.py" in str(script.value)
    with pytest.raises(PlatformError, match="it said: ") as app:
        open_contender("fastapi", asked).start()
    assert "plain_app:app" in str(app.value)


def test_there_is_one_for_each_name() -> None:
    assert set(PEERS) == set(CONTENDERS)


def test_vllm_is_left_out_where_there_is_none(demo_model: Make, tmp_path: Path) -> None:
    for name in (name for name in PEERS if name.startswith("vllm")):
        for python, word in (
            (None, "no interpreter that has vLLM was given"),
            (str(tmp_path / "none"), "no interpreter"),
            (_without_vllm(tmp_path), "has no vLLM"),
        ):
            asked = Asked(demo_model(), PROMPT, 6, vllm_python=python)
            with pytest.raises(PlatformError, match=word):
                open_contender(name, asked)


def _without_vllm(folder: Path) -> str:
    """An interpreter that finds no packages but its own."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_a_server_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    # The app is imported before its port is bound, and finds no model.
    started: list[psutil.Process] = []

    def ask() -> None:
        with plain_server(tmp_path / "none") as server:
            started.append(psutil.Process(server.pid))
            started[0].kill()
            knock_at(server, time.monotonic_ns() + 600_000_000_000).close()

    with pytest.raises(PlatformError, match="a server has ended"):
        ask()
    assert not started[0].is_running()
