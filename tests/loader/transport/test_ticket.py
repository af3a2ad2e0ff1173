"""Tickets: what is written by a stranger is looked at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coldframe.loader.errors import RequestError, TransferRefused
from coldframe.loader.kv.runs import deal, portions, runs_of, stretches_of
from coldframe.loader.transport.base import Ticket, Way, host_id, new_token
from coldframe.loader.transport.registry import check_names

TICKET = Ticket(
    new_token(),
    "r1",
    "f" * 64,
    "block-layer-kv-token-head/32/float32",
    4096,
    3,
    70,
    30.0,
    (
        Way("shared", "/run/x/memory.sock", "some-boot", "cpu"),
        Way("tcp", "10.0.0.1:7000"),
        Way("nixl", "10.0.0.1:7000"),
    ),
)


def test_a_ticket_travels_as_json() -> None:
    assert Ticket.from_wire(json.loads(json.dumps(TICKET.to_wire()))) == TICKET


def test_tokens_are_not_to_be_guessed() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 32 for token in tokens)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("version", None),
        ("token", "../../etc/passwd"),
        ("token", "0" * 31),
        ("token", 5),
        ("blocks", -1),
        ("blocks", 1 << 40),
        ("blocks", True),
        ("block_bytes", "4096"),
        ("block_bytes", 1 << 40),
        ("kv_tokens", 1.5),
        ("ttl_s", 0),
        ("ttl_s", float("nan")),
        ("ttl_s", 1e9),
        ("ttl_s", True),
        ("request", "x" * 10_000),
        ("fingerprint", 3),
        ("ways", {}),
        ("ways", [1]),
        ("ways", [{"transport": "tcp"}] * 9),
        ("ways", [{"transport": "tcp", "address": 7}]),
        ("ways", [{"transport": "x" * 600}]),
    ],
)
def test_what_is_no_ticket_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TransferRefused):
        Ticket.from_wire({**TICKET.to_wire(), name: value})


@pytest.mark.parametrize("data", [None, [], "ticket", 7])
def test_nor_is_anything_else(data: Any) -> None:
    with pytest.raises(TransferRefused):
        Ticket.from_wire(data)


def test_runs_are_of_neighbours() -> None:
    assert runs_of([7, 8, 9, 3, 4, 20], 0, 6) == [(7, 0, 3), (3, 3, 2), (20, 5, 1)]
    assert runs_of([7, 8, 9, 3], 2, 4) == [(9, 2, 1), (3, 3, 1)]
    assert runs_of([7, 8], 2, 2) == []


def test_stretches_join_where_both_sides_do() -> None:
    assert stretches_of([(7, 0, 3)], [1, 2, 9], 10) == [(70, 10, 20), (90, 90, 10)]
    assert stretches_of([(7, 0, 1), (8, 1, 1)], [1, 2], 10) == [(70, 10, 20)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_are_all_there_is(count: int) -> None:
    runs = [(10, 0, 3), (40, 3, 1), (20, 4, 5)]
    parts = deal(runs, count)
    assert len(parts) <= count
    places = [
        (here + step, there + step)
        for part in parts
        for here, there, blocks in part
        for step in range(blocks)
    ]
    assert places == [
        (here + step, there + step) for here, there, blocks in runs for step in range(blocks)
    ]


def test_names_of_transports() -> None:
    assert check_names(["tcp", "shared"], "x") == ("shared", "tcp")
    with pytest.raises(RequestError, match="no such way"):
        check_names(["tcp", "udp"], "x")


def test_a_machine_knows_itself() -> None:
    assert host_id() == host_id() != ""


@pytest.mark.parametrize("most", [1, 7, 10, 25, 30, 100])
def test_portions_are_the_same_bytes(most: int) -> None:
    stretches = [(70, 10, 20), (200, 90, 10), (0, 300, 3)]
    parts = list(portions(stretches, most))
    sizes = [sum(length for _, _, length in part) for part in parts]
    assert sizes[:-1] == [most] * (len(parts) - 1)
    assert 0 < sizes[-1] <= most
    moved = [
        (to + step, source + step)
        for part in parts
        for to, source, length in part
        for step in range(length)
    ]
    assert moved == [
        (to + step, source + step) for to, source, length in stretches for step in range(length)
    ]


def test_of_nothing_there_are_no_portions() -> None:
    assert list(portions([], 10)) == []
