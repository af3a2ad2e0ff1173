"""Which decode workers on other hosts there are to be: named ones, and those that are listed."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError, RequestError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.replica.scale_spec import MOST_WORKERS
from coldframe.runtime.transport.lookups import EVERY_S
from coldframe.runtime.transport.remotes import Remotes


class House:
    """Who has the processes, and what they do."""

    def __init__(self) -> None:
        self.now = 0.0
        self.there: dict[str, str] = {}
        """Address by name."""
        self.started: list[str] = []
        self.busy: set[str] = set()
        self.retired: set[str] = set()
        self.refuse = False
        self.warnings: list[str] = []
        self.recorder = Recorder("front")
        self.seen: list[tuple[str, str | None]] = []
        self.remotes: Remotes | None = None

    def open(self, *addresses: str, places: tuple[str, ...] = ()) -> Remotes:
        self.remotes = Remotes(
            *(self, self, addresses, places, self.recorder, self.warnings.append),
            lambda: self.now,
        )
        return self.remotes

    def start_remote(self, address: str) -> str:
        if self.refuse:
            raise PlatformError("no process can be started")
        self.started.append(address)
        name = f"remote-{len(self.started)}"
        self.there[name] = address
        return name

    def end_remote(self, name: str) -> None:
        assert name not in self.busy
        self.die(name, "it is not listed any more")

    def die(self, name: str, why: str) -> None:
        """Its process is gone."""
        del self.there[name]
        assert self.remotes is not None
        self.remotes.died(name, why)

    def retire(self, worker: str) -> None:
        self.retired.add(worker)

    def retain(self, worker: str) -> None:
        self.retired.remove(worker)

    def is_free(self, worker: str) -> bool:
        return worker not in self.busy

    @property
    def spans(self) -> list[tuple[str, str | None]]:
        self.seen += [(span.name, span.note) for span in self.recorder.drain()]
        return self.seen

    def pass_until(self, done: Callable[[], bool]) -> None:
        """Steps, as seconds go by, until something is so."""
        assert self.remotes is not None
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, (self.there, self.warnings)
            self.now += EVERY_S
            self.remotes.step()
            time.sleep(0.005)  # for the thread that looks

    def pass_looks(self, times: int = 2) -> None:
        """Whatever is listed now has been seen."""
        assert self.remotes is not None
        lookups = self.remotes._lookups
        assert lookups is not None
        for _ in range(times):
            self.now += EVERY_S
            self.remotes.step()
            for place in lookups._places:
                assert place.thread is not None
                place.thread.join(60)
        self.remotes.step()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    if made.remotes is not None:
        made.remotes.close()


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    return tmp_path / "decode workers"


def place_of(path: Path) -> str:
    return f"file://{path}".replace(" ", "%20")


def write(path: Path, *addresses: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("".join(f"{address}\n" for address in addresses))
    beside.rename(path)


def test_named_ones_are_tried_again_ever_later(house: House) -> None:
    remotes = house.open("a:1", "b:1", "a:1")
    assert remotes.fd is None
    remotes.step()
    assert house.started == ["a:1", "b:1"]
    waits = []
    for _ in range(7):
        house.die(next(name for name, at in house.there.items() if at == "a:1"), "gone")
        before, count = house.now, len(house.started)
        while len(house.started) == count:
            house.now += 0.25
            remotes.step()
        waits.append(house.now - before)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert house.warnings == ["no decode worker at a:1: gone"]  # once of each loss
    name = next(name for name, at in house.there.items() if at == "a:1")
    remotes.is_up(name)
    house.die(name, "gone again")
    assert house.warnings[1:] == ["no decode worker at a:1: gone again"]
    assert ("remote_lost", "a:1: gone again") in house.spans


def test_one_that_cannot_be_started_is_tried_again(house: House) -> None:
    remotes = house.open("a:1")
    house.refuse = True
    remotes.step()
    assert "no process can be started" in house.warnings[0]
    house.refuse = False
    house.now += 0.5
    remotes.step()
    assert house.started == ["a:1"]


def test_a_list_is_followed(house: House, listed: Path) -> None:
    house.open("a:1", places=(place_of(listed),))
    house.pass_looks()
    assert house.started == ["a:1"]
    told = f"no decode worker is found at {place_of(listed)}: none is listed there"
    assert house.warnings == [told]
    write(listed, "10.0.0.1:7", "# a remark", "[::1]:7", "a:1")
    house.pass_looks()
    assert sorted(house.started) == ["10.0.0.1:7", "[::1]:7", "a:1"]
    write(listed, "[::1]:7")
    house.pass_looks()
    # One that is named besides is there to stay.
    assert sorted(house.there.values()) == ["[::1]:7", "a:1"]
    assert ("remote_listed", "10.0.0.1:7") in house.spans
    assert ("remote_unlisted", "10.0.0.1:7") in house.spans
    assert len(house.warnings) == 1  # nobody was lost


def test_who_looks_says_so(house: House, listed: Path) -> None:
    """The loop hears of it by a descriptor, not by its next second."""
    write(listed, "a:1")
    remotes = house.open(places=(place_of(listed),))
    lookups = remotes._lookups
    assert lookups is not None
    lookups.step()
    readable, _, _ = select.select([remotes.fd], [], [], 60)
    assert readable == [remotes.fd]
    remotes.step()  # with no time gone
    assert house.started == ["a:1"]


def test_who_is_busy_is_let_go_when_it_is_not(house: House, listed: Path) -> None:
    write(listed, "a:1", "b:1")
    remotes = house.open(places=(place_of(listed),))
    house.pass_until(lambda: len(house.there) == 2)
    name = next(name for name, at in house.there.items() if at == "a:1")
    remotes.is_up(name)
    house.busy.add(name)
    write(listed, "b:1")
    house.pass_looks()
    assert house.retired == {name}
    assert sorted(house.there.values()) == ["a:1", "b:1"]
    house.busy.remove(name)
    remotes.step()
    assert list(house.there.values()) == ["b:1"]
    house.pass_looks()
    assert house.started.count("a:1") == 1


def test_the_end_of_one_that_is_not_listed_is_no_loss(house: House, listed: Path) -> None:
    write(listed, "a:1")
    remotes = house.open(places=(place_of(listed),))
    house.pass_until(lambda: bool(house.there))
    (name,) = house.there
    remotes.is_up(name)
    house.busy.add(name)
    write(listed)
    house.pass_looks()
    house.die(name, "the connection ended")
    house.pass_looks()
    assert house.started == ["a:1"]
    assert not any("no decode worker at" in warning for warning in house.warnings)


def test_who_comes_back_onto_the_list_stays(house: House, listed: Path) -> None:
    write(listed, "a:1", "b:1")
    remotes = house.open(places=(place_of(listed),))
    house.pass_until(lambda: len(house.there) == 2)
    names = {address: name for name, address in house.there.items()}
    house.busy |= set(names.values())
    write(listed)
    house.pass_looks()
    assert house.retired == set(names.values())
    remotes.leaves(names["b:1"])  # by itself, meanwhile
    write(listed, "a:1", "b:1")
    house.pass_looks()
    assert house.retired == {names["b:1"]}
    house.die(names["b:1"], "exit status 1")
    assert house.warnings[-1] == "no decode worker at b:1: it was told to end"
    house.pass_until(lambda: house.started.count("b:1") == 2)


def test_a_list_that_cannot_be_read_says_nothing(house: House, listed: Path) -> None:
    write(listed, "a:1")
    house.open(places=(place_of(listed),))
    house.pass_until(lambda: bool(house.there))
    for _ in range(2):
        write(listed, "half a li")
        house.pass_looks()
    assert list(house.there.values()) == ["a:1"]
    assert len(house.warnings) == 1
    assert "it cannot be asked" in house.warnings[0]
    assert "('half a li')" in house.warnings[0]
    write(listed, "a:1")
    house.pass_looks()
    write(listed)
    house.pass_looks()
    assert len(house.warnings) == 2
    assert not house.there


def test_nobody_waits_for_a_list_that_does_not_come(house: House, tmp_path: Path) -> None:
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    os.mkfifo(slow)  # whoever opens it waits for somebody who writes
    write(quick, "b:1")
    remotes = house.open(places=(place_of(slow), place_of(quick)))
    house.pass_until(lambda: list(house.there.values()) == ["b:1"])
    lookups = remotes._lookups
    assert lookups is not None
    looking = lookups._places[0].thread
    assert looking is not None
    assert looking.is_alive()
    house.pass_until(lambda: house.now > 100)
    assert lookups._places[0].thread is looking  # one look at a time
    slow.write_text("a:1\n")
    house.pass_until(lambda: sorted(house.there.values()) == ["a:1", "b:1"])
    remotes.close()
    for place in lookups._places:  # one more may be waiting
        while place.thread is not None and place.thread.is_alive():
            try:
                os.close(os.open(slow, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                time.sleep(0.005)


def test_all_addresses_of_a_name(house: House) -> None:
    house.open(places=("dns://127.0.0.1:7000",))
    house.pass_looks()
    assert list(house.there.values()) == ["127.0.0.1:7000"]


def test_a_name_server_that_does_not_answer_ends_nobody(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int] = []
    real = socket.getaddrinfo

    def answer(*what: object, **more: object) -> object:
        if said:
            raise socket.gaierror(said[-1], "as the resolver says")
        return real("10.0.0.1", 7000, type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    house.open(places=("dns://decode:7000",))
    house.pass_looks()
    assert list(house.there.values()) == ["10.0.0.1:7000"]
    said.append(socket.EAI_AGAIN)
    house.pass_looks()
    assert list(house.there.values()) == ["10.0.0.1:7000"]
    # A headless service without a pod that is ready is a name that nobody has.
    said.append(socket.EAI_NONAME)
    house.pass_looks()
    assert not house.there
    assert len(house.warnings) == 2


def test_a_list_that_is_too_long(house: House, listed: Path) -> None:
    write(listed, *(f"10.0.1.{number}:7" for number in range(1, 250)))
    house.open("named:1", places=(place_of(listed),))
    house.pass_looks()
    first = set(house.there.values())
    write(listed, *(f"10.0.{part}.{number}:7" for part in (0, 1) for number in range(1, 250)))
    house.pass_looks()
    found = set(house.there.values())
    assert len(found) == MOST_WORKERS
    assert first < found  # who is there stays
    assert house.warnings == [
        f"499 decode workers are listed, and no more than {MOST_WORKERS} of them are connected"
    ]


@pytest.mark.parametrize("place", ["dns://name", "file://relative", "etcd://x:1", "file:///a%00b"])
def test_what_is_no_list(house: House, place: str) -> None:
    with pytest.raises(RequestError):
        house.open(places=(place,))
