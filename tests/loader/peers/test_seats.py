"""Who gets a seat, and who is sent on."""

from __future__ import annotations

from coldframe.loader.peers.seats import Seats


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sent_to(seats: Seats, node: str, serves: str | None = "x:1", *avoid: str) -> str | None:
    reader = seats.take(node, serves, avoid)
    return None if reader is None else reader.node


def test_the_first_gets_the_seat_and_the_next_is_sent_to_it() -> None:
    seats = Seats()
    assert sent_to(seats, "a") is None
    assert sent_to(seats, "b") == "a"
    assert sent_to(seats, "c") == "a"
    assert sent_to(seats, "a") is None  # it keeps its seat
    assert seats.taken == 1


def test_a_seat_that_is_left_is_free() -> None:
    seats = Seats()
    assert sent_to(seats, "a") is None
    seats.leave("nobody")
    seats.leave("a")
    assert sent_to(seats, "b") is None


def test_whoever_is_not_heard_of_has_lost_it() -> None:
    clock = Clock()
    seats = Seats(1, 10.0, clock)
    assert sent_to(seats, "a") is None
    clock.now = 9.0
    assert sent_to(seats, "a") is None
    clock.now = 18.0
    assert sent_to(seats, "b") == "a"
    clock.now = 19.0
    assert seats.taken == 0
    assert sent_to(seats, "b") is None
    assert sent_to(seats, "a") == "b"


def test_several_seats_send_on_in_turn() -> None:
    seats = Seats(2)
    assert [sent_to(seats, node) for node in "ab"] == [None, None]
    assert sorted(str(sent_to(seats, node)) for node in "cd") == ["a", "b"]
    assert sorted(str(sent_to(seats, node)) for node in "ef") == ["a", "b"]


def test_nobody_is_sent_to_whom_it_could_not_read_from() -> None:
    seats = Seats()
    assert sent_to(seats, "a") is None
    assert sent_to(seats, "b", "x:1", "a") is None
    assert sent_to(seats, "c", "x:1", "a") == "b"


def test_a_reader_that_serves_nobody_ends_no_row() -> None:
    seats = Seats()
    assert sent_to(seats, "a", None) is None
    assert sent_to(seats, "b") is None  # there is nobody to be sent to
    assert sent_to(seats, "c") == "b"
