"""One model as the gateway has it, without a process: what it waits for, and what it asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.questions import Questions
from coldframe.runtime.gateway.served import ServedModel
from coldframe.runtime.gateway.settings import GatewaySettings
from coldframe.runtime.gateway.waiting import Hall

CARD = ModelCard("m", 1, 256, 1000)


class Front:
    """What a model speaks to, written down."""

    def __init__(self, **settings: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.phases: list[tuple[str, str]] = []
        self.questions = Questions(self.sent.append)
        self.hall = Hall(1000)
        self.model = ServedModel(
            "m",
            GatewaySettings(("m",), "generic", **settings),
            self.hall,
            self.sent.append,
            self.questions,
            Metrics(),
            lambda _, before, phase: self.phases.append((before, phase)),
        )

    def says(self, phase: str, **more: Any) -> None:
        self.model.take_state(LoadState(phase, **more))

    @property
    def asked(self) -> list[str]:
        return [message["what"] for message in self.sent if message["type"] == "ask"]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))  # type: ignore[arg-type]


async def started(work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Something that waits by now."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)
    return task


# -- phases ---------------------------------------------------------------------------------------


def test_a_phase_that_is_over_already_has_been_reached() -> None:
    async def test() -> None:
        front = Front()
        waiting = await started(front.model.until(frozenset({"ready"}), 60))
        front.says("ready")
        front.says("parked")
        front.says("failed")
        await waiting
        assert front.phases == [("starting", "ready"), ("ready", "parked"), ("parked", "failed")]

    run(test)


@pytest.mark.parametrize(("phase", "code"), [("failed", "replica_error"), ("draining", "draining")])
def test_who_waits_for_a_phase_that_will_not_come_is_told(phase: str, code: str) -> None:
    async def test() -> None:
        front = Front()
        waiting = await started(front.model.until(frozenset({"ready"}), 60))
        front.says("zero")
        front.says(phase, error=ReplicaError("it died").to_wire())
        with pytest.raises(ApiError) as caught:
            await waiting
        assert caught.value.code == code

    run(test)


def test_a_wait_for_a_phase_ends() -> None:
    async def test() -> None:
        front = Front()
        with pytest.raises(ApiError, match="still starting"):
            await front.model.until(frozenset({"ready"}), 0.01)
        front.says("ready")
        await front.model.until(frozenset({"ready"}), 60)

    run(test)


def test_only_who_was_never_open_starts_for_the_first_time() -> None:
    async def test() -> None:
        front = Front()
        assert front.model.starts_first
        front.says("ready", open=True)
        front.says("starting", failures=3)
        assert not front.model.starts_first
        lazy = Front()
        lazy.says("zero", open=True)
        lazy.says("starting")
        assert not lazy.model.starts_first

    run(test)


# -- its card -------------------------------------------------------------------------------------


def test_a_start_is_asked_for_once_until_it_has_been_tried() -> None:
    async def test() -> None:
        front = Front()
        waiting = [await started(front.model.card()) for _ in range(3)]
        assert front.asked == []  # it may be starting, for all that is known
        front.says("zero")
        waiting.append(await started(front.model.card()))
        front.says("zero", failures=1)
        assert front.asked == ["wake_up"]
        front.says("starting")
        front.says("zero")
        # The first question has not been answered: to the front they are the same.
        front.questions.answered(1, {})
        front.says("starting")
        front.says("zero")
        assert front.asked == ["wake_up", "wake_up"]
        front.model.take_card(CARD)
        assert await asyncio.gather(*waiting) == [CARD] * 4
        front.says("starting")
        front.says("zero")
        assert len(front.asked) == 2

    run(test)


def test_nobody_who_has_gone_wakes_it() -> None:
    async def test() -> None:
        front = Front()
        waiting = await started(front.model.card())
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        front.says("zero")
        assert front.asked == []

    run(test)


def test_those_who_wait_for_a_card_are_as_many_and_as_large_as_a_line_holds() -> None:
    async def test() -> None:
        front = Front(max_running=1, max_waiting=2)
        waiting = [await started(front.model.card(size=300)) for _ in range(3)]
        with pytest.raises(ApiError) as caught:
            await front.model.card()
        assert (caught.value.status, caught.value.code) == (503, "queue_full")
        waiting.pop().cancel()
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many"):
            await front.model.card(size=401)
        waiting.append(await started(front.model.card(size=400)))
        front.model.take_card(CARD)
        assert await asyncio.gather(*waiting) == [CARD] * 3
        assert front.hall.fits(1000)

    run(test)


def test_a_card_is_not_waited_for_for_ever() -> None:
    async def test() -> None:
        front = Front(max_wait_s=0.01)
        front.says("zero", bytes_done=1, bytes_total=2, elapsed_s=0.1)
        with pytest.raises(ApiError) as caught:
            await front.model.card()
        assert (caught.value.status, caught.value.code) == (503, "deadline")
        assert caught.value.more["progress"] == 0.5

    run(test)


# -- questions ------------------------------------------------------------------------------------


def test_everybody_who_asks_meanwhile_gets_the_same_answer() -> None:
    async def test() -> None:
        sent: list[dict[str, Any]] = []
        questions = Questions(sent.append)
        asked = [await started(questions.ask("a", "stats")) for _ in range(3)]
        other = await started(questions.ask("b", "stats"))
        assert [(m["id"], m["model"], m["what"]) for m in sent] == [
            (1, "a", "stats"),
            (2, "b", "stats"),
        ]
        asked.pop().cancel()
        questions.answered(1, {"of": "a"})
        questions.answered(1, {"of": "nobody"})
        questions.answered(7, {"of": "nobody"})
        assert await asyncio.gather(*asked) == [{"of": "a"}] * 2
        later = await started(questions.ask("a", "stats"))
        assert sent[-1]["id"] == 3
        questions.answered(3, {"of": "later"})
        questions.answered(2, {"of": "b"})
        assert (await later, await other) == ({"of": "later"}, {"of": "b"})

    run(test)
