"""Which peer is chosen, and who goes to the store where nobody has anything."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from coldframe.loader.peers.choice import Candidate, Wanted, is_awaited, others, ranked
from coldframe.loader.peers.node import CHOOSING, FAILED, LOADED, LOADING, Root, hashed
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.peer_talk import NodeFacts

ME = hashed("me")[:32]
MODEL, PRINT = hashed("s3://bucket/m"), hashed("print")
WANTED = Wanted(MODEL, PRINT)


def node(name: str, state: str = LOADED, **more: object) -> Candidate:
    facts = NodeFacts(hashed(name)[:32], MODEL, PRINT, None, state, state == LOADING, True, 100, 0)
    if state == CHOOSING:
        facts = replace(facts, fingerprint=None, done=0)
    return Candidate(Peer(name, 9400), replace(facts, **more))  # type: ignore[arg-type]


def names(found: list[Candidate]) -> list[str]:
    return [candidate.peer.host for candidate in found]


def best(*found: Candidate, wanted: Wanted = WANTED, done: int | None = None) -> list[str]:
    return names(ranked(found, wanted, ME, done))


def test_loaded_before_loading_then_fewer_readers_then_more_bytes() -> None:
    found = [
        node("one reader", readers=1),
        node("behind", LOADING, done=10),
        node("free"),
        node("ahead", LOADING, done=90),
    ]
    for order in permutations(found):
        assert best(*order) == ["free", "one reader", "ahead", "behind"]


@pytest.mark.parametrize(
    "candidate",
    [
        node("x", FAILED),
        node("x", CHOOSING),
        node("x", whole=False),
        node("x", fingerprint=hashed("another")),
    ],
)
def test_who_is_of_no_use(candidate: Candidate) -> None:
    assert best(candidate) == []


def test_without_a_look_at_the_store_the_same_place_is_believed() -> None:
    same, other = node("same"), node("other", model=hashed("s3://bucket/n"))
    assert best(same, other, wanted=Wanted(MODEL)) == ["same"]
    assert sorted(best(same, other)) == ["other", "same"]


def test_another_version_of_the_same_place_is_refused() -> None:
    ours, theirs = Root(hashed("place"), hashed("v2")), Root(hashed("place"), hashed("v1"))
    wanted = Wanted(MODEL, PRINT, ours)
    assert best(node("old", root=theirs), wanted=wanted) == []
    assert best(node("new", root=ours), wanted=wanted) == ["new"]
    # From elsewhere: nothing is known of its versions.
    assert best(node("else", root=Root(hashed("disk"), hashed("v1"))), wanted=wanted) == ["else"]


def test_in_mid_load_only_those_who_have_more() -> None:
    found = [node("less", LOADING, done=49), node("as much", LOADING, done=50)]
    found += [node("more", LOADING, done=51), node("all", done=0)]
    assert best(*found, done=50) == ["all", "more"]
    assert best(*found, done=0) == ["all", "more", "as much", "less"]


def test_each_node_once_and_never_oneself() -> None:
    twice = node("a")
    found = [twice, Candidate(Peer("alias", 1), twice.facts), node("me", node=ME), node("b")]
    assert names(others(found, ME)) == ["a", "b"]


def test_equals_are_asked_in_an_order_of_ones_own() -> None:
    found = [node("a"), node("b")]
    firsts = {names(ranked(found, WANTED, hashed(str(i))[:32]))[0] for i in range(20)}
    assert firsts == {"a", "b"}


def test_of_those_who_start_together_one_goes_to_the_store() -> None:
    starting = [node(name, CHOOSING) for name in "abcd"]
    going = []
    for me in starting:
        rest = others(starting, me.facts.node)
        if not is_awaited(rest, Wanted(MODEL), me.facts.node):
            going.append(me.facts.node)
    assert going == [min(each.facts.node for each in starting)]


def test_whoever_has_a_peer_is_waited_for_and_other_models_are_not() -> None:
    least = "0" * 32
    assert is_awaited([node("a", CHOOSING, seated=True)], Wanted(MODEL), least)
    assert not is_awaited([node("a", CHOOSING)], Wanted(MODEL), least)
    assert not is_awaited([node("a", LOADING)], Wanted(MODEL), "f" * 32)
    assert not is_awaited([node("a", CHOOSING)], Wanted(hashed("other")), "f" * 32)
