"""KV from the native prefill in the real vLLM: the same tokens, and nothing left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.runtime.integrations.vllm import fingerprint
from coldframe.runtime.integrations.vllm.transfer import (
    Mode,
    consume,
    digest_of,
    produce,
    prompt_of,
    read_handed,
)
from tests.runtime.integrations.vllm.hosts import ENVIRONMENT, Host, host
from tests.runtime.integrations.vllm.prefills import Native
from tests.runtime.integrations.vllm.transfers import (
    Asked,
    cancel_while_loaded,
    checksums,
    compiled,
    counts,
    forget,
    fresh,
    hold_back,
    let_through,
    native_of,
    nothing_is_left,
    own_fingerprint,
    plain,
    preempt,
    run_one,
    settle,
    step_some,
    step_until,
    transfer_config,
)
from tests.support import unavailable

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LENGTHS = (1, 40, 128, 300)
INDUCTOR = {
    # What vLLM keeps itself it never finds again: the memory service's path is part of its name.
    "VLLM_USE_AOT_COMPILE": "0",
    "TORCHINDUCTOR_CACHE_DIR": str(Path(ENVIRONMENT["VLLM_CACHE_ROOT"], "inductor")),
}


@pytest.fixture(scope="module")
def layered(demo_model, native: Native) -> Iterator[Host]:
    config = transfer_config(native, "layered", "recompute")
    with host(demo_model(), dtype="float32", kv_transfer_config=config) as made:
        yield made


@pytest.fixture(params=["layered", "beside"])
def engine(request: pytest.FixtureRequest) -> Host:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_tokens_are_those_of_vllm_alone(engine: Host, native: Native, mode: Mode) -> None:
    free, before = engine.free_blocks(), counts(engine)
    for length in LENGTHS:
        asked = Asked(native, fresh(length), mode)
        asked.add(engine)
        answer = engine.run()[asked.name]
        assert answer.tokens == plain(engine, asked.prompt)
        if mode == "exact":
            assert answer.tokens[0] == asked.handoff.job.generated_ids[0]
    done = counts(engine)
    expected = sum(LENGTHS) - (0 if mode == "fast" else len(LENGTHS))
    assert done["loaded_tokens"] - before.get("loaded_tokens", 0) == expected
    nothing_is_left(engine, native, free)


def test_many_at_once(engine: Host, native: Native) -> None:
    free = engine.free_blocks()
    many = [Asked(native, fresh(length)) for length in (*LENGTHS, 33, 64)]
    for asked in many:
        asked.add(engine)
    answers = engine.run()
    for asked in many:
        assert answers[asked.name].tokens == plain(engine, asked.prompt)
    nothing_is_left(engine, native, free)


def test_the_kv_is_really_used(engine: Host, native: Native) -> None:
    asked = Asked(native, fresh(128))
    native.poison(asked.name)
    asked.add(engine)
    assert engine.run()[asked.name].tokens != plain(engine, asked.prompt)
    native.wait_used(0)


def test_only_what_is_missing_is_copied(layered: Host, native: Native) -> None:
    prompt = fresh(300)
    layered.generate([prompt[:260]], max_tokens=1)  # vLLM has two blocks of 128 tokens of it
    before = counts(layered)["loaded_tokens"]
    asked = Asked(native, prompt)
    asked.add(layered)
    answer = layered.run()[asked.name]
    assert counts(layered)["loaded_tokens"] - before == 300 - 256
    assert answer.tokens == plain(layered, asked.prompt)
    # Then it has all of it, and takes nothing.
    again = Asked(native, prompt)
    layered.generate([again.prompt], max_tokens=1)
    native.wait_used(len(again.handoff.blocks))
    again.params["coldframe"]["kv_tokens"] = 256
    again.params["coldframe"]["tokens"] = digest_of(again.prompt[:256])
    again.add(layered)
    assert layered.run()[again.name].tokens == answer.tokens
    assert counts(layered)["loaded_tokens"] - before == 300 - 256
    native.wait_used(0)


def test_a_part_of_it_is_taken_too(engine: Host, native: Native) -> None:
    asked = Asked(native, fresh(200))
    asked.params = consume(replace(asked.handoff, kv_tokens=70), "fast")
    asked.add(engine)
    assert engine.run()[asked.name].tokens == plain(engine, asked.prompt)
    native.wait_used(0)


@pytest.mark.parametrize("length", [1, 40, 300])
def test_lost_kv_is_computed_again(layered: Host, native: Native, length: int) -> None:
    free, before = layered.free_blocks(), counts(layered)
    asked = Asked(native, fresh(length))
    native.release(asked.name)  # as when the lease has run out
    native.wait_used(0)
    asked.add(layered)
    assert layered.run()[asked.name].tokens == plain(layered, asked.prompt)
    assert counts(layered)["recomputed"] == before.get("recomputed", 0) + 1
    nothing_is_left(layered, native, free)


def test_lost_kv_is_an_error_where_that_is_wanted(beside: Host, native: Native) -> None:
    free = beside.free_blocks()
    asked = Asked(native, fresh(40))
    native.release(asked.name)
    native.wait_used(0)
    asked.add(beside)
    assert beside.run()[asked.name].finish == "error"
    after = Asked(native, fresh(40))
    after.add(beside)
    assert beside.run()[after.name].tokens == plain(beside, after.prompt)
    nothing_is_left(beside, native, free)


@pytest.mark.parametrize("what", ["model", "engine", "maker", "tokens", "format"])
def test_what_does_not_fit_is_not_used(engine: Host, native: Native, what: str) -> None:
    before = counts(engine)
    mine = engine.call(own_fingerprint)
    made = fingerprint.native(native.spec, native.plan.fingerprint, native.config)
    assert fingerprint.kv_differences(made, mine) == {}
    asked = Asked(native, fresh(128), made_by=made, made_for=mine)
    params = asked.params["coldframe"]
    if what == "model":
        params["model"] = "another"
    elif what == "engine":
        params["made_for"]["version"] = "0.1"
    elif what == "maker":
        params["made_by"]["rope"] = "theta=1"
    elif what == "tokens":
        params["tokens"] = digest_of(fresh(128))
    else:
        params["kv_format"] = "another"
    native.poison(asked.name)  # none of it may come
    asked.add(engine)
    assert engine.run()[asked.name].tokens == plain(engine, asked.prompt)
    done = counts(engine)
    assert done["mismatched"] == before.get("mismatched", 0) + 1
    assert done["recomputed"] == before.get("recomputed", 0) + 1
    if what == "tokens":  # it may be another's
        assert native.used() == len(asked.handoff.blocks)
        native.release(asked.name)
    native.wait_used(0)


def test_who_fits_is_served(engine: Host, native: Native) -> None:
    before = counts(engine)
    made = fingerprint.native(native.spec, native.plan.fingerprint, native.config)
    asked = Asked(native, fresh(40), made_by=made, made_for=engine.call(own_fingerprint))
    asked.add(engine)
    assert engine.run()[asked.name].tokens == plain(engine, asked.prompt)
    assert counts(engine)["loaded_tokens"] == before.get("loaded_tokens", 0) + 40


def test_kv_that_is_not_what_was_written(layered: Host, native: Native) -> None:
    free, before = layered.free_blocks(), counts(layered)
    asked = Asked(native, fresh(300))
    asked.params = consume(asked.handoff, "fast", checksums=checksums(native, asked))
    asked.add(layered)
    answer = layered.run()[asked.name]
    assert answer.tokens == plain(layered, asked.prompt)
    assert answer.cached == 300
    bad = Asked(native, fresh(300))
    bad.params = consume(bad.handoff, "fast", checksums=checksums(native, bad))
    native.poison(bad.name)
    bad.add(layered)
    answer = layered.run()[bad.name]
    assert answer.tokens == plain(layered, bad.prompt)
    assert answer.cached == 0  # it was not known at the beginning
    # Nobody finds in vLLM's prefix cache what was refused.
    assert layered.generate([bad.prompt])[0].tokens == plain(layered, bad.prompt)
    done = counts(layered)
    assert done["recomputed"] == before.get("recomputed", 0) + 1
    assert done["loaded"] == before.get("loaded", 0) + 1
    nothing_is_left(layered, native, free)


def test_kv_that_is_not_what_was_written_may_be_an_error(beside: Host, native: Native) -> None:
    free = beside.free_blocks()
    bad = Asked(native, fresh(300))
    bad.params = consume(bad.handoff, "fast", checksums=checksums(native, bad))
    native.poison(bad.name)
    bad.add(beside)
    assert beside.run()[bad.name].finish == "error"
    nothing_is_left(beside, native, free)


def test_a_preempted_request_is_vllms_own(engine: Host, native: Native) -> None:
    free, before = engine.free_blocks(), counts(engine)
    asked = Asked(native, fresh(128))
    asked.add(engine)
    engine.call(step_until, asked.name, 4)
    engine.call(preempt)
    assert engine.run()[asked.name].tokens == plain(engine, asked.prompt)
    assert counts(engine)["loaded"] == before.get("loaded", 0) + 1
    nothing_is_left(engine, native, free)


def test_cancelled_before_it_is_scheduled(engine: Host, native: Native) -> None:
    free = engine.free_blocks()
    asked = Asked(native, fresh(128))
    asked.add(engine)
    engine.ask("abort", asked.name)
    engine.call(settle)
    nothing_is_left(engine, native, free)


def test_cancelled_while_it_is_loaded(beside: Host, native: Native) -> None:
    free = beside.free_blocks()
    asked = Asked(native, fresh(128))
    beside.call(hold_back)
    asked.add(beside)
    beside.call(step_some, 3)
    assert beside.free_blocks() < free
    beside.ask("abort", asked.name)
    beside.call(step_some, 3)
    # What is written to must not be somebody else's meanwhile, on neither side.
    assert beside.free_blocks() < free
    assert native.used() == len(asked.handoff.blocks)
    beside.call(let_through)
    beside.call(settle)
    nothing_is_left(beside, native, free)
    after = Asked(native, fresh(128))
    after.add(beside)
    assert beside.run()[after.name].tokens == plain(beside, after.prompt)


def test_an_idle_worker_lets_go_of_what_was_cancelled(beside: Host, native: Native) -> None:
    """The last request is gone; its blocks are not, and it takes further steps to free them."""
    free = beside.free_blocks()
    asked = Asked(native, fresh(128))
    beside.call(cancel_while_loaded, asked.handoff.job, asked.params)
    nothing_is_left(beside, native, free)


def test_others_go_on_while_one_is_loaded(beside: Host, native: Native) -> None:
    other = fresh(40)
    expected = plain(beside, other)
    asked = Asked(native, fresh(128))
    beside.call(hold_back)
    asked.add(beside)
    beside.add("other", other)
    assert beside.call(run_one, "other") == expected
    beside.call(let_through)
    assert beside.run()[asked.name].tokens == plain(beside, asked.prompt)
    native.wait_used(0)


def test_a_service_that_dies(demo_model) -> None:
    """While KV is loaded, and before: the tokens are right, and requests go on to be served. So
    they are where what comes beside steps is not what was written."""
    with native_of(demo_model()) as native:
        config = transfer_config(native, "async", "recompute")
        with host(demo_model(), dtype="float32", kv_transfer_config=config) as engine:
            free = engine.free_blocks()
            bad = Asked(native, fresh(300))
            bad.params = consume(bad.handoff, "fast", checksums=checksums(native, bad))
            native.poison(bad.name)
            bad.add(engine)
            assert engine.run()[bad.name].tokens == plain(engine, bad.prompt)
            nothing_is_left(engine, native, free)
            asked, late = Asked(native, fresh(300)), Asked(native, fresh(128))
            engine.call(hold_back)
            asked.add(engine)
            engine.call(step_some, 3)
            native.kill()
            time.sleep(0.1)
            engine.call(let_through)
            assert engine.run()[asked.name].tokens == plain(engine, asked.prompt)
            late.add(engine)
            assert engine.run()[late.name].tokens == plain(engine, late.prompt)
            assert counts(engine)["recomputed"] == 2
            assert engine.free_blocks() == free


def test_compiled_in_bfloat16(demo_model) -> None:
    """Where keys lie quite differently."""
    model = demo_model("llama", "bfloat16")
    with native_of(model) as native:
        more = {"enforce_eager": False, "environment": INDUCTOR}
        config = transfer_config(native, "layered", "recompute")
        with host(model, kv_transfer_config=config, **more) as engine:
            for length in LENGTHS:
                asked = Asked(native, fresh(length), "exact")
                asked.add(engine)
                tokens = engine.run()[asked.name].tokens
                # The two engines round differently: the same as far as that goes.
                assert tokens[0] == asked.handoff.job.generated_ids[0]
            assert counts(engine)["loaded_tokens"] == sum(LENGTHS) - len(LENGTHS)
            # What vLLM has written itself comes back bit by bit.
            prompt = fresh(200)
            expected = plain(engine, prompt)
            native.open("mine")
            engine.add("mine", prompt, produce(native.job("mine", prompt)), max_tokens=1)
            outcome = read_handed(engine.run()["mine"].kv_transfer_params)
            assert outcome is not None
            assert outcome.handoff is not None, outcome.why
            engine.call(forget)
            engine.add("mine", prompt_of(outcome.handoff, "fast"), consume(outcome.handoff, "fast"))
            assert [*outcome.handoff.job.generated_ids, *engine.run()["mine"].tokens][
                :16
            ] == expected
            native.wait_used(0)


def test_compiled_by_inductor(demo_model, native: Native) -> None:
    """As vLLM runs where nobody says `enforce_eager`: KV comes and goes within one graph."""
    config = transfer_config(native, "layered", "recompute")
    more = {"enforce_eager": False, "environment": INDUCTOR, "kv_transfer_config": config}
    with host(demo_model(), dtype="float32", **more) as engine:
        backend, graphs = engine.call(compiled)
        assert (backend, graphs > 0) == ("inductor", True)
        free = engine.free_blocks()
        for length in LENGTHS:
            asked = Asked(native, fresh(length))
            asked.add(engine)
            assert engine.run()[asked.name].tokens == plain(engine, asked.prompt)
            name, prompt = f"compiled-{length}", fresh(length)
            native.open(name)
            engine.add(name, prompt, produce(native.job(name, prompt, 16)), max_tokens=1)
            outcome = read_handed(engine.run()[name].kv_transfer_params)
            assert outcome is not None
            assert outcome.handoff is not None, outcome.why
            assert native.decode(outcome.handoff)[0] == plain(engine, prompt)
        assert counts(engine)["loaded_tokens"] == counts(engine)["saved_tokens"] == sum(LENGTHS)
        nothing_is_left(engine, native, free)


def test_ranks_share_a_request(demo_model, native: Native) -> None:
    """Each has its heads: in KV that comes, and in KV that goes."""
    if not {0, 1} <= os.sched_getaffinity(0):
        unavailable("each rank has a core of its own: 0 and 1")
    config = transfer_config(native, "async", "recompute")
    more = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    with host(demo_model(), dtype="float32", kv_transfer_config=config, **more) as engine:
        free, prompt = engine.free_blocks(), fresh(300)
        asked = Asked(native, prompt)
        asked.add(engine)
        tokens = engine.run()[asked.name].tokens
        assert tokens == plain(engine, asked.prompt)
        native.open("ranks")
        engine.add("ranks", prompt, produce(native.job("ranks", prompt)), max_tokens=1)
        outcome = read_handed(engine.run()["ranks"].kv_transfer_params)
        assert outcome is not None
        assert outcome.handoff is not None, outcome.why
        assert native.decode(outcome.handoff)[0][1:] == tokens
        nothing_is_left(engine, native, free)
