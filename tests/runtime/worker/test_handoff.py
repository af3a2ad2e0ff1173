"""Jobs and hand-offs, there and back over real JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.worker.handoff import VERSION, Handoff, Job

IDS = st.lists(st.integers(0, 200_000), max_size=5).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 100),
    logit_bias=st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(1 << 63), (1 << 64) - 1),
    max_tokens=st.integers(1, 1000),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2).map(tuple),
    stop_token_ids=IDS,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
JOBS = st.builds(
    Job,
    request=st.text(max_size=5),
    attempt=st.integers(0, 10),
    params=PARAMS,
    prompt=st.none() | st.text(),
    prompt_ids=st.none() | IDS,
    generated_ids=IDS,
)


def over_the_wire(data: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(data))
    return copy


@given(JOBS)
def test_a_job_arrives_as_it_was_sent(job: Job) -> None:
    assert Job.from_wire(over_the_wire(job.to_wire())) == job


@given(JOBS, IDS, st.integers(0, 100))
def test_a_handoff_arrives_as_it_was_sent(
    job: Job, blocks: tuple[int, ...], kv_tokens: int
) -> None:
    handoff = Handoff(job, "0123abcd", "block/32/BF16", blocks, kv_tokens, "cuda:1")
    assert Handoff.from_wire(over_the_wire(handoff.to_wire())) == handoff


@pytest.mark.parametrize("version", [None, VERSION + 1, str(VERSION)])
def test_another_version_is_refused(version: object) -> None:
    job = Job("r", 0, SamplingParams(), prompt_ids=(1,), generated_ids=(2,))
    wire = over_the_wire(Handoff(job, "plan", "kv", (0,), 1, "cpu").to_wire()) | {
        "version": version
    }
    with pytest.raises(ReplicaError, match="another version") as error:
        Handoff.from_wire(wire)
    assert error.value.expected == str(VERSION)


def test_what_travels_cannot_be_changed_on_the_way() -> None:
    job = Job("r", 0, SamplingParams())
    with pytest.raises(AttributeError):
        job.attempt = 1  # type: ignore[misc]
    assert replace(job, attempt=1) != job
