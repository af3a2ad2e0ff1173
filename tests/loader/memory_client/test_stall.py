from __future__ import annotations

import pytest

from coldframe.loader.errors import SourceUnreachable
from coldframe.loader.memory_client import stall
from coldframe.loader.memory_client.stall import StallWatch
from coldframe.loader.memory_service.board import Progress


def test_only_bytes_count_and_each_wait_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = 0.0
    monkeypatch.setattr(stall, "AwakeClock", lambda: lambda: moment)
    watch = StallWatch(10.0)
    watch.begin()
    watch.check(Progress(5, 100), "stage 1")
    moment = 9.0
    watch.check(Progress(5, 100), "stage 1")
    watch.check(Progress(6, 100), "stage 1")
    moment = 18.0
    watch.check(Progress(6, 100), "stage 1")
    moment = 20.0
    with pytest.raises(SourceUnreachable, match="no byte") as caught:
        watch.check(Progress(6, 100), "stage 1")
    assert caught.value.where == "stage 1"
    watch.begin()
    watch.check(Progress(6, 100), "stage 1")
