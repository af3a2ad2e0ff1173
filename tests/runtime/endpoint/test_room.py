"""Who gets a device's memory, and who makes room for it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coldframe.loader.errors import DeviceError
from coldframe.runtime.endpoint.room import Room


class Tenant:
    """Somebody who goes at once, or when it is told that its requests are done."""

    def __init__(self, room: Room, *, busy: bool = False) -> None:
        self.room = room
        self.used_at = 0.0
        self.leaving = False
        self.can_go = True
        self.busy = busy
        self.sent_away = 0

    def make_room(self) -> None:
        self.sent_away += 1
        self.leaving = True
        if not self.busy:
            self.go()

    def go(self) -> None:
        self.leaving = False
        self.room.leave(self)


def tenants(room: Room, count: int) -> list[Tenant]:
    made = [Tenant(room) for _ in range(count)]
    for moment, tenant in enumerate(made):
        tenant.used_at = float(moment)
    return made


def test_who_fits_is_let_in() -> None:
    room = Room(10)
    one, two = tenants(room, 2)
    assert room.take(one, 6)
    assert room.take(two, 4)
    assert room.free == 0
    assert room.take(one, 6)  # it has it already
    room.leave(two)
    assert room.changed
    assert room.free == 4


def test_who_has_nothing_has_no_room_to_make() -> None:
    room = Room(10)
    parked, old, new = tenants(room, 3)
    assert room.take(parked, 6)
    room.shrink(parked, 0)
    assert room.take(old, 6)
    old.can_go = False
    assert not room.take(new, 6)
    assert parked.sent_away == 0
    assert not room.take(parked, 6)  # in its turn
    old.can_go = True
    assert not room.take(new, 6)
    assert (parked.sent_away, old.sent_away) == (0, 1)
    assert room.take(new, 6)


def test_the_one_used_longest_ago_makes_room() -> None:
    room = Room(10)
    old, young, new = tenants(room, 3)
    assert room.take(young, 5)
    assert room.take(old, 5)
    assert not room.take(new, 5)
    assert (old.sent_away, young.sent_away) == (1, 0)
    assert room.take(new, 5)


def test_no_more_go_than_will_do() -> None:
    room = Room(10)
    small, large, new = tenants(room, 3)
    assert room.take(small, 1)
    assert room.take(large, 9)
    assert not room.take(new, 8)
    # The small one was first in turn, and would not have been enough.
    assert (small.sent_away, large.sent_away) == (0, 1)
    assert room.take(new, 8)


def test_who_is_asked_makes_room_later_and_is_not_told_twice() -> None:
    room = Room(10)
    one, two = tenants(room, 2)
    one.busy = True
    assert room.take(one, 10)
    for _ in range(3):
        assert not room.take(two, 10)
    assert one.sent_away == 1
    one.go()
    assert room.take(two, 10)


def test_who_has_just_come_is_left_alone() -> None:
    room = Room(10)
    one, two = tenants(room, 2)
    one.can_go = False
    assert room.take(one, 10)
    assert not room.take(two, 10)
    assert one.sent_away == 0
    one.can_go = True
    assert not room.take(two, 10)
    assert room.take(two, 10)


def test_a_large_one_is_not_passed_by_small_ones() -> None:
    room = Room(10)
    here, large, small = tenants(room, 3)
    here.busy = True
    assert room.take(here, 5)
    assert not room.take(large, 10)
    assert not room.take(small, 5)
    here.go()
    assert not room.take(small, 5)
    assert room.take(large, 10)
    assert not room.take(small, 5)
    room.leave(small)  # nobody asks it any more
    room.leave(large)
    assert room.take(here, 5)


def test_what_shows_later_takes_what_there_is_until_then() -> None:
    room = Room(10)
    one, two = tenants(room, 2)
    assert room.take(one, 6)
    assert room.take(two, None)
    assert room.free == 0
    assert not room.settle(two, 5)  # more than there was
    assert room.free == 4
    assert not room.take(two, 5)
    assert one.sent_away == 1
    assert room.take(two, 5)
    assert not room.settle(one, 6)


def test_what_is_known_at_last_gives_the_rest_back() -> None:
    room = Room(10)
    one, two = tenants(room, 2)
    assert room.take(one, None)
    assert room.settle(one, 3)
    assert room.take(two, 7)


def test_who_is_parked_gives_back_what_it_does_not_need_and_asks_for_it_again() -> None:
    room = Room(10)
    one, two = tenants(room, 2)
    assert room.take(one, 6)
    room.changed = False
    room.shrink(one, 3)
    assert room.changed
    assert room.take(two, 7)
    assert not room.take(one, 6)  # the other one goes for it
    assert two.sent_away == 1
    assert room.take(one, 6)
    assert room.free == 4


def test_who_wants_no_more_after_all_is_out_of_the_way() -> None:
    room = Room(10)
    one, two, three = tenants(room, 3)
    two.busy = True
    assert room.take(one, 3)
    assert room.take(two, 7)
    assert not room.take(one, 6)
    assert not room.take(three, 3)
    room.withdraw(one)
    assert room.free == 0
    two.go()
    assert room.take(three, 3)
    assert room.free == 4  # the first one kept what it had


def test_what_fits_no_device_of_this_size_is_an_error() -> None:
    room = Room(10)
    room.fit(10, "model")
    with pytest.raises(DeviceError, match="does not fit") as caught:
        room.fit(11, "model")
    assert caught.value.hint is not None


def test_what_there_is_shows_when_the_first_is_up() -> None:
    room = Room(None)
    first, second = tenants(room, 2)
    room.fit(10**15, "nobody knows yet")
    assert room.take(first, None)
    assert not room.take(second, 4)  # it might not fit
    assert (room.free, room.changed) == (0, False)
    room.learn(10)
    assert (room.changed, room.free) == (True, 0)  # the first has all, until it knows what it needs
    assert room.settle(first, 6)
    assert room.take(second, 4)
    room.learn(99)  # whoever comes next has nothing new to say
    assert room.total == 10


def test_the_first_may_know_what_it_needs_and_may_go_without_a_word() -> None:
    room = Room(None)
    first, second = tenants(room, 2)
    assert room.take(first, 6)
    assert room.take(first, 6)
    assert not room.take(second, 6)
    room.leave(first)
    assert room.take(second, 6)
    room.learn(10)
    assert room.free == 4
    assert room.take(first, 4)


class Turns(RuleBasedStateMachine):
    """Whatever comes: no more is given out than there is, and everybody has their turn."""

    @initialize(needs=st.lists(st.integers(1, 10), min_size=2, max_size=5))
    def begin(self, needs: list[int]) -> None:
        self.room = Room(10)
        self.needs = needs
        self.tenants = [Tenant(self.room) for _ in needs]
        self.clock = 0.0

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.needs) - 1))
        tenant = self.tenants[index]
        self.clock += 1
        tenant.used_at = self.clock
        self.room.take(tenant, self.needs[index])

    @rule(data=st.data(), busy=st.booleans(), can_go=st.booleans())
    def change(self, data: st.DataObject, busy: bool, can_go: bool) -> None:
        tenant = data.draw(st.sampled_from(self.tenants))
        tenant.busy, tenant.can_go = busy, can_go
        if not busy and tenant.leaving:
            tenant.go()

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.tenants)).go()

    @rule()
    def everybody_in_turn(self) -> None:
        for tenant in self.tenants:
            tenant.busy, tenant.can_go = False, True
            if tenant.leaving:
                tenant.go()
        asking = set(range(len(self.needs)))
        for _ in range(3 * len(self.needs) + 3):
            asking -= {i for i in asking if self.room.take(self.tenants[i], self.needs[i])}
        assert not asking

    @invariant()
    def no_more_than_there_is(self) -> None:
        if hasattr(self, "room"):
            assert self.room.free >= 0


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
