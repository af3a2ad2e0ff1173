from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.kv.room import KvRoom

GIB = 1 << 30


def test_kv_takes_what_weights_and_programs_leave() -> None:
    room = KvRoom(reserve=1 * GIB)
    # Of 80: a tenth is nobody's, 16 are weights still to come, 1 for workers, 1 somebody's already.
    assert room.nbytes(80 * GIB, 79 * GIB, 16 * GIB) == (79 - 16 - 8 - 1) * GIB
    assert room.nbytes(80 * GIB, 63 * GIB, 0) == (63 - 8 - 1) * GIB


def test_several_models_have_a_part_each() -> None:
    assert KvRoom(part=0.25).nbytes(80 * GIB, 79 * GIB, 16 * GIB) == 20 * GIB


def test_where_nothing_is_left_there_is_none() -> None:
    assert KvRoom().nbytes(16 * GIB, 15 * GIB, 15 * GIB) == 0


@given(
    st.integers(0, 1 << 40),
    st.floats(0, 1),
    st.integers(0, 1 << 38),
    st.integers(0, 1 << 38),
    st.floats(0, 1),
)
def test_it_never_takes_what_is_not_there(
    total: int, part_free: float, coming: int, reserve: int, part: float
) -> None:
    room, free = KvRoom(reserve=reserve, part=part), int(part_free * total)
    found = room.nbytes(total, free, coming)
    assert 0 <= found <= max(0, free - coming)
    assert found <= round(part * total)
    assert KvRoom.from_wire(room.to_wire()) == room
