from __future__ import annotations

import threading

import pytest

from coldframe.loader.errors import (
    SourceBusy,
    SourceError,
    SourceProtocol,
    SourceUnreachable,
)
from coldframe.loader.web.broken import Broken
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.patience import Patience

LIMITS = Limits(patience_s=60.0, backoff_s=0.1, longest_backoff_s=5.0, redirects=3)


class Kit:
    def __init__(self, limits: Limits = LIMITS) -> None:
        self.now = 0.0
        self.cancelled = threading.Event()
        self.patience = Patience(limits, "x, bytes 0-9", self.cancelled, clock=lambda: self.now)

    def fail(self, broken: Broken | None = None) -> float:
        pause = self.patience.failed(broken or Broken("cut"))
        self.now += pause
        return pause


def test_pauses_are_random_grow_and_end_with_patience() -> None:
    kits = [Kit() for _ in range(200)]
    first = [kit.fail() for kit in kits]
    assert min(first) >= 0
    assert 0.05 < max(first) <= 0.1
    assert len(set(first)) > 100
    later = [max(kit.fail() for _ in range(7)) for kit in kits]
    assert 2.0 < max(later) <= 5.0

    kit = Kit()
    while kit.now < 60:
        kit.fail()
    assert kit.now == pytest.approx(60.0)  # the last attempt comes when patience ends
    with pytest.raises(SourceUnreachable, match="60") as caught:
        kit.fail()
    assert not isinstance(caught.value, SourceBusy)
    assert caught.value.where == "x, bytes 0-9"


def test_progress_renews_it() -> None:
    kit = Kit()
    for _ in range(500):
        kit.now += 50
        kit.fail()
        kit.patience.progress()
    assert kit.now > 10_000


def test_waiting_for_others_does_not_count() -> None:
    kit = Kit()
    kit.now += 500
    kit.patience.excuse(500)
    assert kit.fail() <= 0.1


def test_retry_after_is_added_to() -> None:
    kit = Kit()
    assert 7 <= kit.fail(Broken("busy", status=503, after_s=7)) <= 7.1
    with pytest.raises(SourceBusy, match="503"):
        kit.fail(Broken("busy", status=503, after_s=100))
    with pytest.raises(SourceUnreachable, match="100 s"):
        kit.fail(Broken("later", status=500, after_s=100))


def test_redirects_need_no_pause_and_have_a_bound() -> None:
    kit = Kit()
    for _ in range(3):
        assert kit.fail(Broken("moved", at_once=True)) == 0
    with pytest.raises(SourceProtocol, match="moved"):
        kit.fail(Broken("moved", at_once=True))
    kit.patience.progress()
    assert kit.fail(Broken("moved", at_once=True)) == 0


def test_the_hopeless_and_the_cancelled_are_not_tried_again() -> None:
    with pytest.raises(SourceUnreachable, match="1 attempt in"):
        Kit().fail(Broken("unknown", hopeless=True))
    kit = Kit()
    kit.cancelled.set()
    with pytest.raises(SourceError, match="given up"):
        kit.fail()
    with pytest.raises(SourceError, match="given up"):
        kit.patience.pause(60)
