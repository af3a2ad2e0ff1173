"""Arenas that grow, are shared, let go and mapped again in any order, held against a model."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ArenaError, DeviceError, DeviceFull
from tests.loader.devices.emulator import GRANULARITY, Emulator

STEPS = 6
MEMORY = 9 * GRANULARITY


@dataclass(eq=False)
class Step:
    """A piece of memory, as the model knows it."""

    offset: int
    length: int
    content: bytes = bytes(4)


@dataclass(eq=False)
class View:
    """Another mapping of the arena, and what the model says is in it."""

    reservation: DeviceReservation
    steps: list[Step] = field(default_factory=list)


class Arenas(RuleBasedStateMachine):
    views = Bundle("views")

    def __init__(self) -> None:
        super().__init__()
        self.emulator = Emulator(MEMORY)
        self.gpu = Context(Driver.open(self.emulator), 0)
        size = STEPS * GRANULARITY
        self.arena = DeviceArena(self.gpu, size, writable=True, zeroed=True)
        self.steps: list[Step] = []
        self.mapped = True
        self.all_views: list[View] = []

    def teardown(self) -> None:
        for view in self.all_views:
            view.reservation.close()
        self.arena.close()
        self.gpu.close()
        left = self.emulator.left()
        used = self.emulator.used
        self.emulator.close()
        assert (left, used) == ([], 0)

    def held(self) -> int:
        alive = set(self.steps).union(*(view.steps for view in self.all_views))
        return sum(step.length for step in alive)

    @precondition(lambda self: self.mapped)
    @rule(count=st.integers(1, 3))
    def grow(self, count: int) -> None:
        offset = sum(step.length for step in self.steps)
        left = STEPS * GRANULARITY - offset
        length = min(count * GRANULARITY, left)
        if not left:
            with pytest.raises(ArenaError, match="cannot grow"):
                self.arena.grow(count * GRANULARITY)
        elif self.held() + length > MEMORY:
            with pytest.raises(DeviceFull):
                self.arena.grow(count * GRANULARITY)
        else:
            segment = self.arena.grow(count * GRANULARITY)
            assert (segment.offset, segment.length) == (offset, length)
            self.steps.append(Step(offset, length))

    @precondition(lambda self: self.mapped)
    @rule(call=st.sampled_from(["cuMemExportToShareableHandle", "cuMemMap", "cuMemSetAccess"]))
    def fail_to_grow(self, call: str) -> None:
        self.emulator.fail(call)
        with pytest.raises((ArenaError, DeviceError)):
            self.arena.grow(GRANULARITY)
        self.emulator._failures.clear()

    @rule(keep=st.integers(0, STEPS))
    def shrink(self, keep: int) -> None:
        self.arena.shrink(keep * GRANULARITY)
        self.steps = [step for step in self.steps if step.offset < keep * GRANULARITY]

    @rule()
    def let_go(self) -> None:
        self.arena.detach()
        self.mapped = False

    @precondition(lambda self: not self.mapped)
    @rule()
    def come_back(self) -> None:
        self.arena.attach()
        self.mapped = True

    @precondition(lambda self: self.mapped and self.steps)
    @rule(data=st.data(), content=st.binary(min_size=4, max_size=4))
    def write(self, data: st.DataObject, content: bytes) -> None:
        step = data.draw(st.sampled_from(self.steps))
        ctypes.memmove(self.arena.address + step.offset, content, 4)
        step.content = content

    @rule(target=views)
    def new_view(self) -> View:
        view = View(DeviceReservation(self.gpu, STEPS * GRANULARITY))
        self.all_views.append(view)
        return view

    @rule(view=views, first=st.integers(0, STEPS))
    def attach(self, view: View, first: int) -> None:
        wanted = self.steps[first:]
        clash = any(
            old.offset < new.offset + new.length and new.offset < old.offset + old.length
            for new in wanted
            for old in view.steps
        )
        segments = self.arena.segments[first:]
        if clash:
            with pytest.raises(ArenaError, match="there is a segment already"):
                view.reservation.attach(segments)
        else:
            view.reservation.attach(segments)
            view.steps += wanted

    @rule(view=views, begin=st.integers(0, STEPS))
    def detach(self, view: View, begin: int) -> None:
        view.reservation.detach(begin * GRANULARITY)
        view.steps = [step for step in view.steps if step.offset < begin * GRANULARITY]

    @invariant()
    def everything_is_where_it_should_be(self) -> None:
        assert self.arena.grown == sum(step.length for step in self.steps)
        assert self.emulator.used == self.held()
        assert not self.emulator._handles
        mappings = len(self.steps) * self.mapped + sum(len(v.steps) for v in self.all_views)
        assert len(self.emulator._mapped) == mappings
        places = [(self.arena.address, self.steps if self.mapped else [])]
        places += [(view.reservation.address, view.steps) for view in self.all_views]
        for address, steps in places:
            for step in steps:
                assert ctypes.string_at(address + step.offset, 4) == step.content


TestArenas = Arenas.TestCase
TestArenas.settings = settings(max_examples=40, stateful_step_count=25)
