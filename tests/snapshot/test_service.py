from __future__ import annotations

import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, PlatformError, SnapshotError
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.snapshot.service import CloneService
from tests.snapshot.tiny import descriptors, gone


class Shell:
    """A clone that is there at once: a shell that reads its program from its control socket."""

    def __init__(self, control_fd: int) -> None:
        self._process = subprocess.Popen(["sh"], stdin=control_fd)
        self.pidfd = os.pidfd_open(self._process.pid)
        self.channel: Channel | None = None

    def inside(self) -> int:
        return self._process.pid

    def kill(self) -> int:
        self._process.kill()
        os.close(self.pidfd)
        if self.channel is not None:
            self.channel.close()
        return self._process.wait()


class Shells:
    """Makes shells; `slow` ones tell how their start goes only when a test says so."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.gone_names: list[str] = []
        self.news: dict[str, Channel] = {}

    def prepare(self, wanted: dict[str, Any]) -> dict[str, Any]:
        with self.recorder.span("snapshot_check"):
            if wanted["what"] != "shells":
                raise SnapshotError("there is no such thing", got=wanted["what"])
        return {"id": "shell"}

    def clone(self, name: str, control_fd: int) -> Shell:
        if name == "impossible":
            raise PlatformError("it cannot be", where=name)
        shell = Shell(control_fd)
        if name.startswith("slow"):
            shell.channel, self.news[name] = Channel.pair()
        return shell

    def gone(self, name: str) -> None:
        self.gone_names.append(name)


class Front:
    def __init__(self) -> None:
        recorder = Recorder("test")
        self.channel, theirs = Channel.pair()
        self.source = Shells(recorder)
        self._theirs = theirs
        service = CloneService(theirs, self.source, recorder)
        self._thread = threading.Thread(target=service.run, daemon=True)
        self._thread.start()

    def ask(self, kind: str, **fields: Any) -> None:
        self.channel.send({"type": kind, **fields})

    def clone(self, name: str) -> Channel:
        ours, theirs = Channel.pair()
        self.channel.send({"type": "clone", "name": name}, [theirs.fileno()])
        theirs.close()
        return ours

    def said(self) -> dict[str, Any]:
        message = self.channel.recv(10)
        assert message is not None
        return message.body

    def end(self) -> None:
        self.channel.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._theirs.close()
        for channel in self.source.news.values():
            channel.close()


@pytest.fixture
def front() -> Iterator[Front]:
    gc.collect()  # what tests before have left to it is not ours to count
    fds = descriptors()
    found = Front()
    found.ask("prepare", what="shells")
    assert found.said()["type"] == "prepared"
    yield found
    found.end()
    assert descriptors() == fds


def tell(control: Channel, text: str) -> None:
    os.write(control.fileno(), text.encode())


def test_what_was_prepared_and_how_long_that_took(front: Front) -> None:
    front.ask("prepare", what="shells")
    body = front.said()
    assert (body["type"], body["id"]) == ("prepared", "shell")
    assert [span[0] for span in body["spans"]] == ["snapshot_check"]


def test_a_clone_from_its_start_to_its_end(front: Front) -> None:
    control = front.clone("a")
    started = front.said()
    assert (started["type"], started["name"]) == ("started", "a")
    assert not gone(started["pid"])
    tell(control, "exit 7\n")
    ended = front.said()
    assert (ended["type"], ended["name"], ended["status"]) == ("ended", "a", 7)
    assert gone(started["pid"])
    assert front.source.gone_names == ["a"]
    control.close()


def test_a_clone_is_ended_on_demand(front: Front) -> None:
    controls = [front.clone(name) for name in ("a", "b")]
    first, second = front.said(), front.said()
    front.ask("kill", name="nobody")
    front.ask("kill", name="a")
    ended = front.said()
    assert (ended["type"], ended["name"], ended["status"]) == ("ended", "a", -9)
    assert gone(first["pid"])
    assert not gone(second["pid"])
    front.ask("kill", name="a")  # as it has just ended: nothing more comes of it
    front.ask("kill", name="b")
    assert front.said()["name"] == "b"
    for control in controls:
        control.close()


def test_the_end_of_the_socket_is_the_end_of_all(front: Front) -> None:
    controls = [front.clone(name) for name in "abc"]
    pids = [front.said()["pid"] for _ in "abc"]
    front.end()
    assert all(gone(pid) for pid in pids)
    assert sorted(front.source.gone_names) == ["a", "b", "c"]
    for control in controls:
        control.close()


def test_what_cannot_be_made_has_failed_and_has_ended(front: Front) -> None:
    front.clone("impossible").close()
    failed, ended = front.said(), front.said()
    assert (failed["type"], failed["name"]) == ("failed", "impossible")
    assert isinstance(ColdframeError.from_wire(failed["error"]), PlatformError)
    assert (ended["type"], ended["name"], ended["status"]) == ("ended", "impossible", 1)
    control = front.clone("a")  # it goes on
    assert front.said()["type"] == "started"
    control.close()
    assert front.said()["status"] == 0


def test_nothing_is_made_of_what_was_refused(front: Front) -> None:
    front.ask("prepare", what="cars")
    refused = front.said()
    assert refused["type"] == "refused"
    assert [span[0] for span in refused["spans"]] == ["snapshot_check"]
    front.clone("a").close()
    failed, ended = front.said(), front.said()
    assert failed["error"] == refused["error"]
    assert (ended["type"], ended["status"]) == ("ended", 1)


def test_before_anything_is_prepared_there_are_no_clones() -> None:
    front = Front()
    front.clone("a").close()
    assert front.said()["error"]["what"] == "nothing has been prepared"
    assert front.said()["type"] == "ended"
    front.end()


def test_a_start_that_takes_its_time(front: Front) -> None:
    control = front.clone("slow")
    other = front.clone("a")
    assert front.said()["name"] == "a"  # nobody waits for it
    news = front.source.news["slow"]
    news.send({"type": "started"})
    started = front.said()
    assert (started["type"], started["name"]) == ("started", "slow")
    news.close()
    control.close()
    ended = front.said()
    assert (ended["type"], ended["name"], ended["status"]) == ("ended", "slow", 0)
    other.close()
    assert front.said()["name"] == "a"


def test_a_start_that_fails_is_told_before_its_end(front: Front) -> None:
    control = front.clone("slow")
    other = front.clone("a")
    front.said()
    news = front.source.news["slow"]
    error = SnapshotError("it broke")
    news.send({"type": "failed", "error": error.to_wire()})
    control.close()
    failed, ended = front.said(), front.said()
    assert (failed["type"], failed["name"]) == ("failed", "slow")
    assert str(ColdframeError.from_wire(failed["error"])) == str(error)
    assert (ended["type"], ended["name"]) == ("ended", "slow")
    other.close()


def test_a_front_that_is_gone_when_it_is_told_something() -> None:
    front = Front()
    front.ask("prepare", what="shells")
    control = front.clone("a")
    front.said()
    pid = front.said()["pid"]
    front.channel.hang_up()
    front.end()
    assert gone(pid)
    control.close()
