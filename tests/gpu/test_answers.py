"""Answers on the GPU are those of Transformers there, while weights arrive and once they are in."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import arriving, began_while_loading, expected, logprobs, options
from tests.runtime.helpers import Client, ask, finish, prompt_of

Make = Callable[..., Path]

LENGTHS = (1, 40, 128, 300)
"""One token, a block and some, whole blocks, several; beyond the window of those that have one."""


def answered(client: Client) -> list[int]:
    assert client.error is None, client.error
    return client.tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_float32_streamed_and_loaded(
    demo_model: Make, runs: Path, device: str, family: str
) -> None:
    model = demo_model(family, "float32")
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    with arriving(model, runs, device) as replica:
        streamed = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *streamed)
        assert began_while_loading(replica)
        one_by_one = []
        for prompt in prompts:
            one_by_one.append(ask(replica, prompt, 12))
            finish(replica, one_by_one[-1])
        together = [ask(replica, prompt, 12) for prompt in prompts * 2]
        finish(replica, *together)
    wanted = [expected(model, device, tuple(prompt), 12) for prompt in prompts]
    assert [answered(client) for client in streamed] == wanted
    assert [answered(client) for client in one_by_one] == wanted
    assert [answered(client) for client in together] == wanted * 2


def test_float32_without_overlap(demo_model: Make, runs: Path, device: str) -> None:
    model = demo_model("llama", "float32")
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    with Replica(options(model, runs, device, overlap=False)) as replica:
        clients = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *clients)
    wanted = [expected(model, device, tuple(prompt), 12) for prompt in prompts]
    assert [answered(client) for client in clients] == wanted


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_drifts_no_further_than_transformers(
    demo_model: Make, runs: Path, device: str, family: str
) -> None:
    """Both round differently; neither may be much further from float32 than the other."""
    model = demo_model(family, "bfloat16")
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    with Replica(options(model, runs, device)) as replica:
        clients = [ask(replica, prompt, 24, logprobs=0) for prompt in prompts]
        finish(replica, *clients)
    ours, theirs = [], []
    for prompt, client in zip(prompts, clients, strict=True):
        tokens = answered(client)
        exact = logprobs(model, device, "float32", prompt, tokens)
        rounded = logprobs(model, device, "bfloat16", prompt, tokens)
        told = [event.logprob for event in client.events]
        ours += [abs(a - b) for a, b in zip(told, exact, strict=True) if a is not None]
        theirs += [abs(a - b) for a, b in zip(rounded, exact, strict=True)]
    assert len(ours) == len(theirs)
    assert statistics.mean(ours) <= 1.5 * statistics.mean(theirs)
    assert max(ours) <= 3 * max(theirs)
