"""KV of vLLM's own prefill, for a native decode worker and for another vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coldframe.runtime.integrations.vllm.transfer import (
    Outcome,
    consume,
    produce,
    prompt_of,
    read_handed,
)
from tests.runtime.integrations.vllm.hosts import Answer, Host, host
from tests.runtime.integrations.vllm.prefills import Native
from tests.runtime.integrations.vllm.transfers import (
    Asked,
    counts,
    fresh,
    nothing_is_left,
    plain,
    settle,
    step_some,
    transfer_config,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

MOST = 17
LENGTHS = (1, 40, 128, 300)


@pytest.fixture(scope="module")
def prefill(demo_model, native: Native) -> Iterator[Host]:
    """Long prompts in parts, and prompts that begin alike from vLLM's own cache."""
    config = transfer_config(native, "layered", "recompute")
    more = {"max_num_batched_tokens": 160, "kv_transfer_config": config}
    with host(demo_model(), dtype="float32", **more) as made:
        yield made


def ask(engine: Host, native: Native, name: str, prompt: list[int], tokens: int = 1, **how) -> None:
    native.open(name)
    params = produce(native.job(name, prompt, MOST), **how)
    engine.add(name, prompt, params, max_tokens=tokens, ignore_eos=True)


def outcome_of(answer: Answer) -> Outcome:
    found = read_handed(answer.kv_transfer_params)
    assert found is not None
    return found


def alone(native: Native, name: str, prompt: list[int]) -> list[int]:
    return native.decode(native.prefill(f"{name}-alone", prompt, MOST))[0]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_native_worker_goes_on(prefill: Host, native: Native, tokens: int) -> None:
    free = prefill.free_blocks()
    for length in LENGTHS:
        name, prompt = f"n{tokens}-{length}", fresh(length)
        ask(prefill, native, name, prompt, tokens)
        answer = prefill.run()[name]
        outcome = outcome_of(answer)
        assert outcome.handoff is not None, outcome.why
        assert outcome.made_by == prefill.call(_fingerprint)
        made = outcome.handoff.job
        assert list(made.generated_ids) == answer.tokens
        assert len(answer.tokens) == tokens
        found, there = native.decode(outcome.handoff)
        assert there == length
        assert found == alone(native, name, prompt)
    nothing_is_left(prefill, native, free)


def test_another_vllm_goes_on(prefill: Host, beside: Host, native: Native) -> None:
    free = (prefill.free_blocks(), beside.free_blocks())
    before = counts(beside).get("loaded_tokens", 0)
    for length in LENGTHS:
        name, prompt = f"v{length}", fresh(length)
        ask(prefill, native, name, prompt, checksums=True)
        outcome = outcome_of(prefill.run()[name])
        handoff = outcome.handoff
        assert handoff is not None, outcome.why
        params = consume(handoff, "fast", made_by=outcome.made_by, checksums=outcome.checksums)
        assert len(outcome.checksums) == native.spec.layers
        beside.add(name, prompt_of(handoff, "fast"), params, max_tokens=15)
        tokens = [*handoff.job.generated_ids, *beside.run()[name].tokens]
        assert tokens == plain(beside, prompt, max_tokens=16)
    assert counts(beside)["loaded_tokens"] - before == sum(LENGTHS)
    nothing_is_left(prefill, native, free[0])
    nothing_is_left(beside, native, free[1])


def test_many_at_once_that_begin_alike(prefill: Host, native: Native) -> None:
    free, start = prefill.free_blocks(), fresh(140)
    prefill.generate([start], max_tokens=1)
    prompts = {f"m{length}": [*start, *fresh(length)] for length in (1, 30, 90)}
    for name, prompt in prompts.items():
        ask(prefill, native, name, prompt)
    answers = prefill.run()
    for name, prompt in prompts.items():
        handoff = outcome_of(answers[name]).handoff
        assert handoff is not None
        assert native.decode(handoff)[0] == alone(native, name, prompt)
    nothing_is_left(prefill, native, free)


def test_nobody_comes_for_it(prefill: Host, native: Native) -> None:
    """The front lets the request go; where it does not, the lease would run out."""
    free = prefill.free_blocks()
    ask(prefill, native, "lost", fresh(40))
    outcome = outcome_of(prefill.run()["lost"])
    assert outcome.handoff is not None
    native.wait_used(2)
    native.release("lost")
    nothing_is_left(prefill, native, free)


def test_cancelled_on_the_way(prefill: Host, native: Native) -> None:
    free = prefill.free_blocks()
    before = counts(prefill).get("not_handed", 0)
    ask(prefill, native, "early", fresh(40))
    prefill.ask("abort", "early")
    ask(prefill, native, "half", fresh(400))
    prefill.call(step_some, 1)  # a part of its prompt
    prefill.ask("abort", "half")
    prefill.call(settle)
    assert counts(prefill)["not_handed"] == before + 2
    nothing_is_left(prefill, native, free)


def test_no_room_in_the_arena(prefill: Host, native: Native) -> None:
    """The request is served all the same; who goes on with it computes its KV."""
    free = prefill.free_blocks()
    held = [Asked(native, fresh(300)) for _ in range(6)]  # 60 of 64 blocks
    prompt = fresh(128)
    ask(prefill, native, "late", prompt)
    answer = prefill.run()["late"]
    outcome = outcome_of(answer)
    assert (outcome.handoff, outcome.why) == (None, "there were no blocks of the arena for it")
    assert answer.tokens == plain(prefill, prompt, max_tokens=1)
    for asked in held:
        native.release(asked.name)
    nothing_is_left(prefill, native, free)


def test_a_cache_that_quantises_is_refused(prefill: Host) -> None:
    assert prefill.call(_layout_of_quantised) == (
        "vLLM's KV cache does not hold keys and values as they are written"
    )


def test_how_the_cache_lies_is_known_as_a_view(prefill: Host) -> None:
    assert all(prefill.call(_views))


# -- in the engine's process -----------------------------------------------------------------------


def _sides(engine):
    from coldframe.runtime.integrations.vllm.connector import connectors

    return connectors(engine)


def _fingerprint(engine):
    return _sides(engine)[0].fingerprint


def _views(engine):
    return [view is not None for view in _sides(engine)[1]._worker.layout().views]


def _layout_of_quantised(engine):
    """A cache of 8 bits, written to as vLLM writes to one."""
    import torch
    from vllm import _custom_ops as ops

    from coldframe.loader.errors import ReplicaError
    from coldframe.runtime.integrations.vllm.kv_layout import learn

    worker = _sides(engine)[1]._worker
    cache = torch.zeros((4, *worker._layers[0].cache.shape[1:]), dtype=torch.uint8)
    heads, tokens = worker._heads.stop, worker._block_tokens

    def write(k, v, cache, slots):
        flat = cache.view((len(cache), heads, tokens * 2, -1))
        keys, values = flat.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            *(k, v, keys, values, slots, "vec"),
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="fp8_e4m3",
        )

    try:
        learn(write, cache, heads, worker._dim, tokens, torch.bfloat16)
    except ReplicaError as error:
        return error.what
    return None
