"""Grammars that are compiled beside an engine's steps: who waits for them, and who does not."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest

from coldframe.loader.errors import ReplicaError, RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.grammars import _AT_ONCE, _MOST, Grammars
from coldframe.runtime.integrations.vllm.params import ENGINE, ask
from coldframe.runtime.worker.handoff import Job
from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.vllm.hosts import host

pytestmark = pytest.mark.vllm

PROMPT = tuple(prompt_of(20))


def large(parts):
    """A schema of so many objects, each unlike the others; 400 take seconds to compile."""
    text = {"type": "string", "pattern": "^[a-z]{1,20}$"}
    inner = [{f"of_{part}_{n}": text for n in range(4)} for part in range(parts)]
    objects = {
        f"part_{part}": {"type": "object", "properties": found, "required": [*found]}
        for part, found in enumerate(inner)
    }
    return Structure("json", json.dumps({"type": "object", "properties": objects}))


@pytest.fixture(scope="module")
def engine(demo_model):
    from coldframe.runtime.integrations.vllm.environment import SAMPLER_ENVIRONMENT

    with host(demo_model(), dtype="float32", environment=SAMPLER_ENVIRONMENT, **ENGINE) as made:
        yield made


def test_others_are_answered_while_one_is_compiled(engine):
    found = engine.call(beside, PROMPT)
    assert found["others"] == found["alone"]
    assert found["was_under_way"]
    # The engine need not wait for it any more, and the answer keeps to it.
    assert found["there_at_once"]
    for name, value in json.loads(found["formed"]).items():
        part = name.removeprefix("part_")
        assert value.keys() == {f"of_{part}_{n}" for n in range(4)}


def test_what_takes_too_long_is_given_up_and_others_go_on(engine):
    found = engine.call(too_long, PROMPT)
    assert found["first"] == ["RequestError"] * _AT_ONCE
    assert "takes too long to compile" in found["text"]
    # What cannot be stopped keeps nobody out until there are too many of it.
    assert found["between"] == {"yes"}
    assert found["crowded"] == "ReplicaError"
    assert found["threads"] == _MOST


def test_what_is_none_is_refused(engine):
    assert engine.call(refused, PROMPT) == ["RequestError", "RequestError", "RequestError"]


# -- over there ------------------------------------------------------------------------------------


def form_of(structure, prompt, count=400):
    job = Job("r", 0, SamplingParams(max_tokens=count, structured=structure), prompt_ids=prompt)
    return ask(job, (1, 3))


def plain(prompt):
    return ask(Job("r", 0, SamplingParams(max_tokens=16, ignore_eos=True), prompt_ids=prompt), ())


def grammars_of(llm, limit_s):
    from coldframe.runtime.integrations.vllm.engine import Engine

    engine, news = Engine(llm), threading.Event()
    return SimpleNamespace(engine=engine, news=news, all=Grammars(engine, news.set, limit_s))


def awaited(here, count=1):
    """What comes of so many."""
    found = {}
    deadline = time.monotonic() + 100
    while len(found) < count:
        assert time.monotonic() < deadline
        here.news.wait(0.1)
        here.news.clear()
        found.update(here.all.ready())
    return found


def answers(engine, *requests):
    tokens = {request: [] for request in requests}
    over = set()
    while over < set(requests):
        for made in engine.step():
            tokens[made.request] += made.tokens
            if made.over is not None:
                over.add(made.request)
    return tokens


def text_of(llm, tokens):
    return llm.get_tokenizer().decode(tokens, skip_special_tokens=True)


def beside(llm, prompt):
    here = grammars_of(llm, 100)
    engine = here.engine
    engine.add("alone", plain(prompt))
    alone = answers(engine, "alone")["alone"]
    here.all.begin("formed", form_of(large(400), prompt))
    engine.add("a", plain(prompt))
    engine.add("b", plain(prompt))
    others = answers(engine, "a", "b")
    under_way = not here.news.is_set()
    (checked,) = awaited(here).values()
    engine.add("formed", checked)
    # vLLM's own thread finds what was compiled.
    request = next(iter(engine.engine.engine_core.engine_core.scheduler.requests.values()))
    deadline = time.monotonic() + 20
    while not request.structured_output_request.is_grammar_ready and time.monotonic() < deadline:
        time.sleep(0.01)
    ready = request.structured_output_request.is_grammar_ready
    formed = answers(engine, "formed")["formed"]
    assert others["a"] == others["b"]
    return {
        "alone": alone,
        "others": others["a"],
        "was_under_way": under_way,
        "formed": text_of(llm, formed),
        "there_at_once": ready,
    }


def too_long(llm, prompt):
    here = grammars_of(llm, 0.5)
    names = [f"long-{n}" for n in range(_AT_ONCE)]
    for n, name in enumerate(names):
        here.all.begin(name, form_of(large(1200 + n), prompt))
    first = awaited(here, len(names))
    here.all._limit_s = 100.0
    here.all.begin("choice", form_of(Structure("choice", '["yes"]'), prompt))
    here.engine.add("choice", awaited(here)["choice"])
    between = {text_of(llm, tokens) for tokens in answers(here.engine, "choice").values()}
    here.all._limit_s = 0.5
    for n in range(_MOST - _AT_ONCE):
        here.all.begin(f"more-{n}", form_of(large(1210 + n), prompt))
    awaited(here, _MOST - _AT_ONCE)
    here.all.begin("last", form_of(Structure("choice", '["no"]'), prompt))
    threads = sum(thread.name == "grammar" for thread in threading.enumerate())
    (crowded,) = awaited(here).values()
    assert isinstance(crowded, ReplicaError)
    return {
        "first": [type(error).__name__ for error in first.values()],
        "text": str(next(iter(first.values()))),
        "between": between,
        "crowded": type(crowded).__name__,
        "threads": threads,
    }


def refused(llm, prompt):
    here = grammars_of(llm, 100)
    wrong = [Structure("regex", "(["), Structure("grammar", "root ::= other"), None]
    wrong[2] = Structure("json", '{"type": "string", "pattern": "(["}')
    for n, structure in enumerate(wrong):
        here.all.begin(f"wrong-{n}", form_of(structure, prompt))
    found = awaited(here, len(wrong))
    assert all(isinstance(error, RequestError) for error in found.values())
    return [type(error).__name__ for error in found.values()]
