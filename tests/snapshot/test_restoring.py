"""A clone begun before its image is there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.init import Init
from coldframe.snapshot.restorer import ImageSource
from coldframe.snapshot.restoring import begin, go_on
from coldframe.snapshot.service import CloneService
from tests.snapshot.tiny import Image, ask, descriptors, gone, until

Begin = Callable[[Image], tuple[Init, Channel, Path]]


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Begin]:
    """Begins clones of an image that will be in a directory of its own."""
    controls: list[Channel] = []

    def start(image: Image) -> tuple[Init, Channel, Path]:
        images, work = tmp_path / "later", tmp_path / "work"
        images.mkdir()
        work.mkdir()
        ours, theirs = Channel.pair()
        controls.append(ours)
        names, fd = os.listdir(image.directory), theirs.fileno()
        init = begin(image.criu, image.process, str(images), names, str(work), fd, user=False)
        theirs.close()
        return init, ours, images

    before = descriptors()
    yield start
    for control in controls:
        control.close()
    assert descriptors() == before


def waits(init: Init) -> bool:
    """Whether CRIU is there and does nothing: it has come to where it opens the inventory."""
    child = init.inside()
    if child is None:
        return False
    before = psutil.Process(child).num_ctx_switches()
    time.sleep(0.04)
    return psutil.Process(child).num_ctx_switches() == before


def test_it_waits_for_its_image(image: Image, begun: Begin) -> None:
    init, control, images = begun(image)
    until(lambda: waits(init))
    shutil.copytree(image.directory, images, dirs_exist_ok=True)
    time.sleep(0.05)  # nothing goes on by itself
    assert not init.channel.wait_readable(0)
    go_on(init)
    assert ask(control, "state") == 41
    control.close()
    assert init.reap() == 0


def test_an_image_may_come_before_criu_is_ready(image: Image, begun: Begin) -> None:
    init, control, images = begun(image)
    shutil.copytree(image.directory, images, dirs_exist_ok=True)
    go_on(init)
    assert ask(control, "state") == 41
    control.close()
    assert init.reap() == 0


def test_nothing_is_left_of_one_whose_image_never_comes(image: Image, begun: Begin) -> None:
    init, control, _ = begun(image)
    until(lambda: waits(init))
    criu = init.inside()
    assert criu is not None
    assert init.kill() == -9
    until(lambda: gone(criu))
    assert control.recv(10) is None


def test_a_criu_that_ends_early_is_told(image: Image, begun: Begin, tmp_path: Path) -> None:
    broken = tmp_path / "criu"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    init, control, images = begun(image._replace(criu=Criu(str(broken), image.criu.version)))
    shutil.copytree(image.directory, images, dirs_exist_ok=True)
    go_on(init)
    message = init.channel.recv(10)
    assert message is not None
    assert message.kind == "failed"
    assert "exit status 3" in message.body["error"]["got"]
    assert init.reap() == 1
    go_on(init)  # is none of whoever waits for it
    assert control.recv(10) is None


def test_the_service_tells_who_waits(image: Image, tmp_path: Path) -> None:
    """A source that prepares sees which clones are asked for already."""
    ours, theirs = Channel.pair()
    source = ImageSource(Recorder("test"), image.criu)
    service = CloneService(theirs, source, Recorder("test"))
    assert service.asked_for() == {}
    control, other = Channel.pair()
    ours.send({"type": "clone", "name": "one"}, [other.fileno()])
    ours.send({"type": "kill", "name": "none"})
    found = service.asked_for()
    assert list(found) == ["one"]
    assert os.fstat(found["one"]).st_ino == os.fstat(other.fileno()).st_ino
    for channel in (ours, theirs, control, other):
        channel.close()
    os.close(found["one"])
