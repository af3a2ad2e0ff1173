"""Every command that the README and the pages show is run as it stands there.

Models, buckets, hosts and keys are those of `world`. Commands for which `elsewhere` has a reason
are left out; a block's others are run in their order, as its reader would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.commands import ROOT, Block, Line, blocks
from tests.docs.elsewhere import reason_for
from tests.docs.world import World
from tests.support import unavailable

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]


def to_run(block: Block) -> list[Line]:
    return [line for line in block.lines if reason_for(line) is None]


BLOCKS = [block for block in blocks() if any(line.program != "export" for line in to_run(block))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])
def test_the_commands_do_what_they_are_to_do(
    block: Block, world: World, request: pytest.FixtureRequest
) -> None:
    lines = to_run(block)
    programs = {line.program for line in lines}
    if "make" in programs and not (ROOT / ".venv" / ".ready").exists():
        unavailable("the checkout was not set up by make")
    if any(" snapshot " in line.text or line.text.startswith("make demo") for line in lines):
        request.getfixturevalue("criu")
    world.run(block, lines)


def test_another_output_than_the_pages_is_found(world: World) -> None:
    """The check of what is printed is one that can fail."""
    line = Line("coldframe --version", ("coldframe 99...",))
    block = Block(Path(ROOT / "README.md"), 1, "console", (line,))
    with pytest.raises(AssertionError, match="printed"):
        world.run(block, [line])
