"""Offers: an end is told once, and not while somebody reads."""

from __future__ import annotations

import time

import pytest

from coldframe.loader.errors import TransferRefused
from coldframe.loader.transport.base import new_token
from coldframe.loader.transport.offers import Offer, Offers


class Kept:
    def __init__(self) -> None:
        self.ended: list[tuple[str, bool]] = []
        self.stopped = 0
        self.offers = Offers(lambda offer: self.ended.append((offer.request, offer.taken)))

    def add(self, request: str = "r", seconds: float = 60.0) -> str:
        token = new_token()
        self.offers.add(Offer(token, request, (1, 2), time.monotonic() + seconds))
        return token

    def stop(self) -> None:
        self.stopped += 1


def test_what_is_taken_is_over() -> None:
    kept = Kept()
    token = kept.add()
    with kept.offers.reading(token, kept.stop) as offer:
        assert offer.blocks == (1, 2)
    assert kept.offers.take(token)
    assert kept.ended == [("r", True)]
    assert not kept.offers.take(token)
    with pytest.raises(TransferRefused), kept.offers.reading(token, kept.stop):
        pass
    kept.offers.withdraw(token)
    assert kept.ended == [("r", True)]


def test_a_token_that_nobody_has_given() -> None:
    kept = Kept()
    kept.add()
    with pytest.raises(TransferRefused, match="no such KV"):
        kept.offers.begin(new_token(), kept.stop)
    assert not kept.offers.take(new_token())


def test_who_reads_is_broken_off_and_waited_for() -> None:
    kept = Kept()
    token = kept.add()
    with kept.offers.reading(token, kept.stop):
        kept.offers.withdraw(token)
        assert kept.stopped == 1
        assert not kept.ended
        with pytest.raises(TransferRefused):
            kept.offers.begin(token, kept.stop)
    assert kept.ended == [("r", False)]


def test_it_is_over_when_the_last_of_several_has_read() -> None:
    kept = Kept()
    token = kept.add()
    first, second = kept.offers.begin(token, kept.stop), kept.offers.begin(token, kept.stop)
    kept.offers.take(token)
    kept.offers.end(first, kept.stop)
    assert not kept.ended
    kept.offers.end(second, kept.stop)
    assert kept.ended == [("r", True)]
    assert not kept.stopped  # whoever has all of it has all of it


def test_time_runs_out() -> None:
    kept = Kept()
    kept.add("late", seconds=-1)
    token = kept.add("early")
    kept.offers.expire()
    assert kept.ended == [("late", False)]
    kept.offers.withdraw(token)
