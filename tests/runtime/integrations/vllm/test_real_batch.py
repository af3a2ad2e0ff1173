"""`coldframe batch` with a vLLM engine: each line once, and the answer that native workers give."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runtime.batch.test_batch import Files, batch, chat, completion, many, started
from tests.runtime.helpers import prompt_of
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Make = Callable[..., Path]
KV = ("--vllm-kv", "64MiB", "--kv-memory", "64MiB", "--threads", "1")
START_S = 180.0
TOKENS = 16


def lines() -> list[dict[str, Any]]:
    """Of all kinds; what is wrong with one of them does not depend on who answers."""
    found, _ = many(24, TOKENS)
    prompt = list(prompt_of(50, seed=3))
    found += [
        completion("seeded", prompt, TOKENS, temperature=0.9, seed=4, n=2),
        completion("narrow", prompt, TOKENS, temperature=1.2, seed=5, top_k=20, top_p=0.9),
        completion("penalties", prompt, TOKENS, frequency_penalty=0.7, repetition_penalty=1.2),
        completion("one", prompt, 1),
        completion("long", prompt, 9000),
        chat("chat", "Once upon a time", TOKENS, logprobs=True, top_logprobs=2),
    ]
    return found


def told(files: Files) -> dict[str | None, Any]:
    """What clients read of each answer."""
    found: dict[str | None, Any] = {}
    for name, response in files.answers().items():
        body = response["body"]
        if response["status_code"] != 200:
            found[name] = response["status_code"]
            continue
        found[name] = [
            (choice.get("text") or choice["message"]["content"], choice["finish_reason"])
            for choice in body["choices"]
        ]
        found[name].append(body["usage"]["completion_tokens"])
    return found


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model()


@pytest.fixture(scope="module")
def native(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Any]:
    """What comes without vLLM."""
    files = Files(tmp_path_factory.mktemp("native"))
    files.ask(*lines())
    batch(tmp_path_factory.mktemp("r"), model, files, "--threads", "1")
    return told(files)


def test_vllm_alone(
    model: Path, native: dict[str | None, Any], no_leaks: Path, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    files.ask(*lines())
    document, _ = batch(no_leaks, model, files, "--decode", "vllm", *KV)
    assert told(files) == native
    assert (document["refused"], document["unanswered"]) == (1, 0)


def test_vllm_takes_over_and_dies_under_it(
    model: Path, native: dict[str | None, Any], no_leaks: Path, tmp_path: Path
) -> None:
    files = Files(tmp_path)
    files.source = Path("-")  # the batch ends where the input does
    asked = [json.dumps(line) + "\n" for line in lines()]
    with started(
        no_leaks, model, files, "--decode", "native,vllm", *KV, "--json", stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        front = psutil.Process(process.pid)

        def answered(count: int) -> None:
            eventually(lambda: len(files.answers()) == count)

        process.stdin.write("".join(asked[:10]))
        process.stdin.flush()
        answered(10)
        # Beside memory service, prefill and decode; then decode has nothing left to do.
        eventually(lambda: len(front.children()) == 4, seconds=START_S)
        engine = max(front.children(), key=lambda child: (child.create_time(), child.pid))
        eventually(lambda: len(front.children()) == 3, seconds=START_S)
        assert engine.is_running()
        process.stdin.write("".join(asked[10:20]))
        process.stdin.flush()
        answered(20)
        engine.send_signal(signal.SIGSTOP)
        process.stdin.write("".join(asked[20:25]))
        process.stdin.flush()
        time.sleep(1.0)  # it has them by then, and says nothing
        os.kill(engine.pid, signal.SIGKILL)
        out, err = process.communicate("".join(asked[25:]), timeout=100)
    assert process.returncode == 0, err
    assert "native workers decode, not vLLM" in err
    assert told(files) == native
    document = json.loads(out)
    assert (document["lines"], document["unanswered"]) == (len(asked), 0)
