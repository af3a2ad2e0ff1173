"""`coldframe serve` and `coldframe run` with vLLM beside native workers: the real commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIError

from tests.runtime.serving import COLDFRAME, Server, greedy, ids_of, served, together
from tests.runtime.snapshots import eventually, left_behind
from tests.support import without_settings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Make = Callable[..., Path]

BRIDGE = ("--decode", "native,vllm", "--vllm-kv", "64MiB", "--kv-memory", "64MiB")
TEXTS = [f"Once upon a time there were {number} of them" for number in range(8)]
START_S = 180.0


def stages(server: Server) -> list[str]:
    timeline = server.get("/startup").json()["timeline"]
    return [stage["name"] for stage in (timeline or {}).get("stages", [])]


def test_a_server_whose_decode_is_taken_over(demo_model: Make) -> None:
    model = demo_model()
    answers = [greedy(model, ids_of(model, text), 16) for text in TEXTS]

    def all_at_once(server: Server) -> list[str]:
        asks = [
            lambda text=text: server.complete(prompt=text, max_tokens=16, ignore_eos=True)
            for text in TEXTS
        ]
        return together(asks)

    with served(model, *BRIDGE) as server:
        server.ready()
        assert all_at_once(server) == answers
        eventually(lambda: "takeover" in stages(server), seconds=START_S)
        found = stages(server)
        for name in ("vllm_config", "vllm_weights", "vllm_kv", "vllm_warmup"):
            assert name in found
        decode = server.get("/startup").json()["decode"]
        assert (decode["engine"], decode["why"], decode["tier"]) == ("vllm", None, "fresh")
        metrics = server.metrics()
        assert metrics["coldframe_vllm_events_total{takeover}"] == 1
        assert metrics["coldframe_workers{vllm,up}"] == 1
        assert all_at_once(server) == answers
        whole = server.post(
            "/v1/completions",
            {"prompt": TEXTS[0], "max_tokens": 5, "temperature": 0, "ignore_eos": True},
        ).json()
        prompt = len(ids_of(model, TEXTS[0]))
        assert whole["usage"]["prompt_tokens"] == prompt
        assert whole["usage"]["completion_tokens"] == 5
        assert whole["choices"][0]["finish_reason"] == "length"
        # Parked on a CPU the workers stay, and go on; at zero nothing is left of any.
        server.post("/sleep?level=1", {})
        assert all_at_once(server) == answers
        server.post("/sleep?level=2", {})
        eventually(lambda: server.get("/startup").json()["state"] == "zero")
        assert all_at_once(server) == answers


def python_that_fails(folder: Path, times: int) -> Path:
    """This interpreter, but so many starts are killed as soon as there is a file `fail`."""
    program, count = folder / "python", folder / "starts"
    program.write_text(
        "#!/bin/sh\n"
        f'while [ ! -e "{folder}/fail" ]; do sleep 0.1; done\n'
        f'echo >>"{count}"\n'
        f'[ "$(wc -l <"{count}")" -le {times} ] && kill -9 $$\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    program.chmod(0o755)
    return program


def test_who_needs_an_engine_that_does_not_start_is_told_when_to_come_again(
    demo_model: Make, tmp_path: Path
) -> None:
    """OpenAI's client does so by itself, and finds the engine that has come up meanwhile."""
    model = demo_model()
    python = python_that_fails(tmp_path, times=2)
    (tmp_path / "fail").touch()
    # What waits for an engine has it tried out of turn, once.
    with served(model, *BRIDGE, "--vllm-python", python) as server:
        server.ready()
        eventually(lambda: "vllm_failed" in stages(server), seconds=START_S)
        asked: dict[str, Any] = {"prompt": TEXTS[0], "guided_choice": ["yes", "no"]}
        refused = server.post("/v1/completions", asked)
        assert refused.status_code == 503, refused.text
        assert "it does not start at the moment" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert server.complete(prompt=TEXTS[1], max_tokens=8, ignore_eos=True) == greedy(
            model, ids_of(model, TEXTS[1]), 8
        )
        with server.openai(timeout=START_S, max_retries=5) as client:
            answer = client.completions.create(
                model=model.name,
                prompt=TEXTS[0],
                extra_body={"guided_choice": ["yes", "no"]},
            )
        assert answer.choices[0].text in ("yes", "no")
        # The timeline has gone on behind the starts that failed.
        eventually(lambda: "takeover" in stages(server))
        found = stages(server)
        assert found.count("vllm_failed") == 2
        assert {"vllm_weights", "vllm_warmup"} <= set(found)
        decode = server.get("/startup").json()["decode"]
        assert (decode["engine"], decode["why"]) == ("vllm", None)


def test_who_waits_for_an_engine_that_never_comes_up_is_told_so(
    demo_model: Make, tmp_path: Path
) -> None:
    """Where nobody else decodes, the third failure is the replica's; the next one may do better."""
    model = demo_model()
    python = python_that_fails(tmp_path, times=3)
    flags = ("--decode", "vllm", "--vllm-kv", "64MiB", "--kv-memory", "64MiB")
    soon = {"coldframe.runtime.replica.comebacks.AGAIN_S": 0.1}
    body = {"prompt": TEXTS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with (
        served(model, *flags, "--vllm-python", python, front=soon) as server,
        server.openai(timeout=START_S, max_retries=5) as client,
        ThreadPoolExecutor(1) as beside,
    ):
        server.ready()
        told = beside.submit(server.post, "/v1/completions", body)
        behind = {"ignore_eos": True}
        stream = client.completions.create(
            model=model.name, prompt=TEXTS[1], max_tokens=8, stream=True, extra_body=behind
        )
        next(iter(stream))  # it came behind the other one, and has its first token
        (tmp_path / "fail").touch()
        with pytest.raises(APIError, match="vLLM does not come up"):
            list(stream)
        refused = told.result()
        assert refused.status_code == 503, refused.text
        assert refused.headers["retry-after"] == "1"
        answer = client.completions.create(
            model=model.name, prompt=TEXTS[0], max_tokens=8, temperature=0, extra_body=behind
        )
        assert answer.choices[0].text == greedy(model, ids_of(model, TEXTS[0]), 8)


def test_one_answer_with_vllm_alone(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model()
    command = [
        *(COLDFRAME, "run", str(model), "--snapshot", "off", "--decode", "vllm"),
        *("--vllm-kv", "64MiB", "-p", TEXTS[0], "-n", "12", "--ignore-eos", "--json"),
    ]
    environment = without_settings() | {"COLDFRAME_RUN_DIR": str(no_leaks)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=START_S, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["text"] == greedy(model, ids_of(model, TEXTS[0]), 12)
    assert "vllm_weights" in [stage["name"] for stage in document["stages"]]
    assert left_behind(no_leaks) == []
