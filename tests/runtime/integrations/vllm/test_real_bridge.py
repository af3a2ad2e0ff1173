"""Replicas whose decode vLLM takes over, in real processes, and whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.loader.errors import ReplicaError, RequestError
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.router import SILENCE_S
from coldframe.runtime.replica.vllm_spec import BLOCK_TOKENS, VllmOptions
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for
from tests.runtime.integrations.vllm.bridges import (
    PROMPTS,
    START_S,
    Wish,
    answers_natively,
    nothing_held,
    options,
    pid_of,
    spans,
    vllm_is_up,
    workers_of,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Make = Callable[..., Path]

BYTES_PER_TOKEN = 2048
"""Of the demo model's KV in float32."""


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model()


@pytest.fixture(scope="module")
def native_answers(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Wish, Client]]:
    """What else a client may ask for, and what the native workers answer."""
    return answers_natively(model, tmp_path_factory.mktemp("r"))


@pytest.fixture
def _silence_is_borne(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native worker that is stopped while an engine starts is not taken for dead."""
    monkeypatch.setitem(SILENCE_S, "decode", 2 * START_S)


@pytest.mark.usefixtures("_silence_is_borne")
def test_vllm_takes_decode_over_and_gives_it_back(
    model: Path, native_answers: list[tuple[Wish, Client]], no_leaks: Path
) -> None:
    with Replica(options(model, no_leaks)) as replica:
        first = ask(replica, PROMPTS[0], 24)
        finish(replica, first)
        assert first.tokens == expected(model, tuple(PROMPTS[0]), 24)
        assert replica.staff["vllm"]["up"] == 0  # the first answer has waited for none of it
        stays = ask(replica, PROMPTS[1], 400)
        wait_for(replica, lambda: len(stays.events) > 4)
        native = pid_of(replica, "decode")
        os.kill(native, signal.SIGSTOP)
        vllm_is_up(replica)
        # What vLLM leaves behind goes with the run directory.
        assert list(no_leaks.rglob("vllm_dist_*"))
        wait_for(replica, lambda: "takeover" in spans(replica))
        taken = [ask(replica, prompt, 32) for prompt in PROMPTS]
        wait_for(replica, lambda: workers_of(replica, *taken) == {"vllm"})
        finish(replica, *taken)
        for prompt, client in zip(PROMPTS, taken, strict=True):
            assert client.tokens == expected(model, tuple(prompt), 32)
        assert workers_of(replica, stays) == {"decode"}
        os.kill(native, signal.SIGCONT)
        finish(replica, stays)
        assert stays.tokens == expected(model, tuple(PROMPTS[1]), 400)
        wait_for(replica, lambda: not any(n.startswith("decode") for n in replica.pids))
        nothing_held(replica)
        _asked_for_more(replica, native_answers)
        _cancelled(replica)
        _killed(replica, model)


def _asked_for_more(replica: Replica, native_answers: list[tuple[Wish, Client]]) -> None:
    for wish, ours in native_answers:
        theirs = ask(replica, PROMPTS[2], 24, **wish)
        finish(replica, theirs)
        assert (theirs.tokens, theirs.text) == (ours.tokens, ours.text), wish
        assert theirs.events[-1].finish == ours.events[-1].finish
        for mine, its in zip(ours.events, theirs.events, strict=True):
            assert [token for token, _ in its.top] == [token for token, _ in mine.top]
            assert its.spellings == mine.spellings
            assert its.logprob == pytest.approx(mine.logprob, abs=1e-3)
    one = ask(replica, PROMPTS[3], 1)
    finish(replica, one)
    assert one.tokens == expected(Path(replica.options.model), tuple(PROMPTS[3]), 1)


def _cancelled(replica: Replica) -> None:
    clients = [ask(replica, prompt, 200) for prompt in PROMPTS]
    wait_for(replica, lambda: all(len(client.events) > 2 for client in clients))
    for client in clients[1:]:
        replica.cancel(client.request)
    seen = [len(client.events) for client in clients]
    finish(replica, clients[0])
    assert [len(client.events) for client in clients[1:]] == seen[1:]
    nothing_held(replica)


def _killed(replica: Replica, model: Path) -> None:
    # Prefill, of which nothing is needed any more once a request is handed over.
    clients = [ask(replica, prompt, 60) for prompt in PROMPTS[:3]]
    wait_for(replica, lambda: all(len(client.events) > 2 for client in clients))
    os.kill(pid_of(replica, "prefill"), signal.SIGKILL)
    finish(replica, *clients)
    # The engine: native workers go on, and another engine takes over from them.
    clients += [ask(replica, prompt, 60) for prompt in PROMPTS[:3]]
    wait_for(replica, lambda: all(len(client.events) > 2 for client in clients))
    os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
    finish(replica, *clients)
    assert replica.error is None
    for prompt, client in zip(PROMPTS[:3] * 2, clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), 60)
    assert replica.staff["decode"]["up"] == 1
    assert "vllm_failed" in spans(replica)
    nothing_held(replica)


@pytest.mark.usefixtures("_silence_is_borne")
def test_what_is_under_way_moves_with_its_kv(model: Path, no_leaks: Path) -> None:
    with Replica(options(model, no_leaks, move=True)) as replica:
        clients = [ask(replica, prompt, 120) for prompt in PROMPTS[:4]]
        wait_for(replica, lambda: all(len(client.events) > 4 for client in clients))
        native = pid_of(replica, "decode")
        os.kill(native, signal.SIGSTOP)
        vllm_is_up(replica)
        wait_for(replica, lambda: "takeover" in spans(replica))
        assert workers_of(replica, *clients) == {"decode"}
        os.kill(native, signal.SIGCONT)
        wait_for(replica, lambda: workers_of(replica, *clients) == {"vllm"})
        finish(replica, *clients)
        for prompt, client in zip(PROMPTS[:4], clients, strict=True):
            assert client.tokens == expected(model, tuple(prompt), 120)
        assert spans(replica).count("kv_load") == len(clients)
        wait_for(replica, lambda: not any(n.startswith("decode") for n in replica.pids))
        nothing_held(replica)
        # With the memory service all ends, and says so.
        late = ask(replica, PROMPTS[0], 300)
        wait_for(replica, lambda: len(late.events) > 2)
        os.kill(replica.memory_pids["memory"], signal.SIGKILL)
        wait_for(replica, lambda: late.done)
        assert isinstance(late.error, ReplicaError)


def test_an_engine_that_does_not_come_up_costs_nothing(model: Path, no_leaks: Path) -> None:
    warnings: list[str] = []
    asked = options(model, no_leaks)
    broken = VllmOptions(kv_bytes=64 << 20, args=(("no_such_argument", 1),))
    asked = ReplicaOptions(
        model=asked.model, run_dir=asked.run_dir, vllm=broken, kv_bytes=64 << 20, threads=1
    )
    with Replica(asked, warn=warnings.append) as replica:
        client = ask(replica, PROMPTS[0], 8)
        finish(replica, client)
        wait_for(replica, lambda: bool(warnings), START_S)
        assert "no_such_argument" in warnings[0]
        assert "vllm_failed" in spans(replica)
        again = ask(replica, PROMPTS[0], 8)
        finish(replica, again)
        assert again.tokens == client.tokens == expected(model, tuple(PROMPTS[0]), 8)
        assert replica.error is None


def test_vllm_alone_decodes(model: Path, no_leaks: Path) -> None:
    # What its KV has room for only vLLM finds out, where nobody says how large that is.
    native, context = 1024, 1024 - BLOCK_TOKENS
    asked = replace(
        options(model, no_leaks, alone=True),
        vllm=VllmOptions(alone=True),
        kv_bytes=native * BYTES_PER_TOKEN,
    )
    with Replica(asked) as replica:
        early = ask(replica, PROMPTS[0], 24)
        full = ask(replica, prompt_of(context - 1), 24)
        wait_for(replica, lambda: bool(early.events and full.events))
        assert replica.staff["vllm"]["up"] == 0  # prefill is native
        finish(replica, early, full, seconds=START_S)
        assert early.tokens == expected(model, tuple(PROMPTS[0]), 24)
        # It was let in before anybody knew, and there is no room for another token.
        assert full.tokens == expected(model, tuple(prompt_of(context - 1)), 1)
        assert isinstance(full.error, RequestError)
        assert f"expected at most {context} tokens" in str(full.error)
        nothing_held(replica)
        late = ask(replica, prompt_of(context), 1)
        finish(replica, late)
        assert isinstance(late.error, RequestError)
        assert late.events == []
        clients = [ask(replica, prompt, 24) for prompt in PROMPTS]
        finish(replica, *clients)
        for prompt, client in zip(PROMPTS, clients, strict=True):
            assert client.tokens == expected(model, tuple(prompt), 24)
        os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
        client = ask(replica, PROMPTS[0], 24)
        finish(replica, client, seconds=START_S)
        assert client.tokens == expected(model, tuple(PROMPTS[0]), 24)
        assert spans(replica).count("kv_load") > len(clients)
        nothing_held(replica)
