"""What two replicas tell one another of a request: JSON, looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, RequestError, TransferRefused
from coldframe.loader.transport.base import Ticket, Way, new_token
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.transport.base import KEY, Given
from coldframe.runtime.worker.handoff import Handoff, Job

PROMPT = tuple(range(100, 140))
JOB = Job("r1", 2, SamplingParams(seed=7), prompt_ids=PROMPT, generated_ids=(5,))
TICKET = Ticket(new_token(), "r1", "f", "k", 4096, 2, 40, 30.0, (Way("tcp", "127.0.0.1:7000"),))
GIVEN = Given.of(Handoff(JOB, "f", "k", (3, 4), 40, "cpu"), TICKET)


def test_it_travels_as_json() -> None:
    assert Given.from_params(json.loads(json.dumps(GIVEN.to_params()))) == GIVEN
    without = replace(GIVEN, ticket=None)
    assert Given.from_params(json.loads(json.dumps(without.to_params()))) == without


def test_others_parameters_say_nothing() -> None:
    assert Given.from_params(None) is None
    assert Given.from_params({"do_remote_decode": True}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"do": "consume"},
        {"first": "5"},
        {"first": [-1]},
        {"first": [True]},
        {"kv_tokens": -1},
        {"kv_tokens": "40"},
        {"seed": "7"},
        {"tokens": 5},
        {"fingerprint": "x" * 600},
        {"ticket": {"version": 1}},
        {"ticket": []},
    ],
)
def test_what_cannot_be_understood_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ColdframeError):
        Given.from_params({KEY: {**GIVEN.to_params()[KEY], **change}})
    with pytest.raises(RequestError):
        Given.from_params({KEY: [1]})


def test_who_goes_on_behind_the_first_token_has_all_its_kv() -> None:
    found = GIVEN.handoff(JOB)
    assert (found.kv_tokens, found.blocks, found.domain) == (40, (), "")
    assert found.whole
    assert found.foreign
    assert found.ticket == TICKET.to_wire()
    assert Handoff.from_wire(json.loads(json.dumps(found.to_wire()))).ticket == found.ticket


def test_who_makes_it_anew_computes_the_last_of_the_prompt() -> None:
    found = GIVEN.handoff(replace(JOB, generated_ids=()))
    assert found.kv_tokens == 39
    assert found.whole


def test_kv_of_other_tokens_is_refused() -> None:
    other = replace(JOB, prompt_ids=(*PROMPT[:-1], 9))
    with pytest.raises(TransferRefused, match="other tokens"):
        GIVEN.handoff(other)
    with pytest.raises(TransferRefused, match="other tokens"):
        GIVEN.handoff(replace(JOB, prompt_ids=PROMPT[:20]))


def test_without_a_ticket_all_of_it_is_computed() -> None:
    for given in (replace(GIVEN, ticket=None), Given.nothing()):
        found = given.handoff(JOB)
        assert (found.kv_tokens, found.ticket) == (0, None)
        assert found.foreign
    one = GIVEN.of(
        Handoff(replace(JOB, prompt_ids=(1,), generated_ids=()), "f", "k", (), 0, ""), TICKET
    )
    assert one.handoff(replace(JOB, prompt_ids=(1,), generated_ids=())).ticket is None
