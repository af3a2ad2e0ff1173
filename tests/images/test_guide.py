"""What the pages have Docker do with the image for a CPU is done, by buildah and runc in its place.

A line is read as Docker reads it, for the flags that the pages use; another flag is an error here.
Folders that it names are made for the test; the model stands for `/srv/llama`.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.docs.commands import Block, Line, blocks
from tests.images.building import IMAGES, Builder
from tests.images.conftest import Image
from tests.images.container import DEFAULT, Container, Platform
from tests.images.platforms import ASK, PLATFORMS, RIGHTS, STORE, served, text_of
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

NAME = "coldframe:cpu"
MODEL = "/srv/llama"


def of_docker(block: Block) -> list[Line]:
    return [line for line in block.lines if line.program == "docker" and NAME in line.text]


BLOCKS = [block for block in blocks() if of_docker(block)]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("docker run", exit_on_error=False)
    found.add_argument("--rm", action="store_true")
    found.add_argument("--user")
    found.add_argument("-p", action="append", default=[])
    found.add_argument("-v", action="append", default=[])
    found.add_argument("-e", action="append", default=[])
    found.add_argument("--cap-add", action="append", default=[])
    found.add_argument("--security-opt", action="append", default=[])
    found.add_argument("image")
    found.add_argument("command", nargs=argparse.REMAINDER)
    return found


class Docker:
    """Docker, as far as the pages need it.

    Args:
        image: What is called `coldframe:cpu`.
        builder: Of that image.
        model: The model.
        folder: Where the commands are given.
    """

    def __init__(self, image: Image, builder: Builder, model: Path, folder: Path) -> None:
        self.image = image
        self.model = model
        self._builder = builder
        self._folder = folder

    def platform(self, words: list[str]) -> Platform:
        """What `docker run` grants a container."""
        told = parser().parse_args(words)
        assert told.image == NAME
        mounts: dict[bool, dict[str, Path]] = {True: {}, False: {}}
        for volume in told.v:
            here, there, *access = volume.split(":")
            mounts[access == ["ro"]][there] = self._place(here)
        added = [f"CAP_{name}" for name in told.cap_add]
        root = told.user == "0"
        assert told.user in (None, "0")
        assert set(told.security_opt) <= {"seccomp=unconfined"}
        return Platform(
            env=dict(entry.split("=", 1) for entry in told.e),
            args=told.command or None,
            mounts=mounts[True],
            writable=mounts[False],
            user=(0, 0) if root else None,
            # Who is not root has none of them, whatever is granted.
            capabilities=(*DEFAULT, *added) if root else (),
            # Docker's own profile lets through what a capability is for.
            confined=not told.security_opt and "CAP_SYS_ADMIN" not in added,
        )

    def build(self, words: list[str]) -> str:
        """`docker build`, with the names that images have here."""
        name = f"localhost/{words[words.index('-t') + 1]}"
        told = {"-t": name, "--build-arg": f"IMAGE={self.image.name}"}
        assert f"IMAGE={NAME}" in words
        rest = [told.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        file = IMAGES.parent / rest[rest.index("-f") + 1]
        rest[rest.index("-f") + 1] = str(file)
        rest[-1] = str(self._folder / rest[-1])
        how = ("--format", "docker", "--pull-never", "--isolation=chroot")
        self._builder.call("build", *how, *rest, limit=300)
        return name

    def _place(self, shown: str) -> Path:
        if shown == MODEL:
            return self.model
        found = self._folder / shown.removeprefix("$PWD/")
        assert found.parent == self._folder, shown
        found.mkdir(exist_ok=True)
        return found


@pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])
def test_what_docker_is_told_to_do_is_done(
    block: Block,
    image: Image,
    builder: Builder,
    mounted: Any,
    model: Path,
    expected: str,
    tmp_path: Path,
) -> None:
    docker = Docker(image, builder, model, tmp_path)
    for line in of_docker(block):
        # `...` stands for the flags that are shown elsewhere.
        text = line.text.replace(" ... ", f" -v {MODEL}:/model:ro ")
        _, verb, *words = shlex.split(text)
        if verb == "build":
            made = mounted(docker.build(words))
            env = {"COLDFRAME_SNAPSHOT": "require"}
            with served(made, model, env=env, **RIGHTS) as container:
                assert answer(container) == expected
                ends(container)
            continue
        assert verb == "run", text
        platform = docker.platform(words)
        with image.run(platform) as container:
            match list(platform.args or ["serve"]):
                case ["serve", *_]:
                    container.listens(8000)
                    assert answer(container) == expected
                    ends(container)
                case ["doctor", *_]:
                    assert container.end(120) in (0, 1), container.log
                    assert "torch" in container.log
                case ["snapshot", "create", *_]:
                    assert container.end(600) == 0, container.log
                    assert any(platform.writable[STORE].iterdir())
                case ["bench", "image", *_]:
                    assert container.end(300) == 0, container.log
                    lists = {path.name: path for path in platform.writable["/out"].iterdir()}
                    assert set(lists) == {"plain", "record.json", "soci.json"}
                    assert len(lists["plain"].read_text().splitlines()) > 500
                    assert json.loads(lists["soci.json"].read_text())
                case other:
                    raise AssertionError(f"what does {other} do?")


def answer(container: Container) -> str:
    """What a replica says, once it is ready."""
    eventually(lambda: container.get(8000, "/readyz").status_code == 200, seconds=90)
    return text_of(container.post(8000, "/v1/completions", ASK).json())


def ends(container: Container) -> None:
    container.signal("TERM")
    assert container.end(PLATFORMS["docker"].grace_s) == 0, container.log


def test_a_flag_that_nobody_here_knows_is_found() -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parser().parse_args(["--gpus", "all", NAME])
