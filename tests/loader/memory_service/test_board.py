from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from coldframe.loader.errors import ArenaError
from coldframe.loader.memory_service.board import Board, BoardView, Progress, StageState
from coldframe.loader.timeline import now


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def board() -> Iterator[Board]:
    before = open_fds()
    made = Board([100, 0, 50])
    yield made
    made.close()
    assert open_fds() == before


def test_another_process_sees_how_far_it_is(board: Board) -> None:
    code = (
        "import sys\n"
        "from coldframe.loader.memory_service.board import BoardView\n"
        "view = BoardView(int(sys.argv[1]))\n"
        "for line in sys.stdin:\n"
        "    states = [view.state(stage).name for stage in range(view.stages)]\n"
        "    print(view.progress, *states, *(view.ready_ns(s) > 0 for s in range(3)), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(board.fd)],
        pass_fds=[board.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def seen() -> str:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            return child.stdout.readline().strip()

        none = "Progress(done=0, total=150) PENDING PENDING PENDING False False False"
        assert seen() == none
        board.advance(0, 60)
        board.advance(2, 20)
        assert seen() == none.replace("done=0", "done=80")
        board.advance(0, 40)
        board.settle(0, StageState.READY)
        board.settle(2, StageState.FAILED)
        assert seen() == "Progress(done=120, total=150) READY PENDING FAILED True False True"
        child.stdin.close()
        assert child.wait(10) == 0


def test_a_settled_stage_has_its_time(board: Board) -> None:
    view = BoardView(os.dup(board.fd))
    assert view.ready_ns(1) == 0
    before = now()
    board.settle(1, StageState.READY)
    assert before <= view.ready_ns(1) <= now()
    assert board.state(1) is view.state(1) is StageState.READY
    assert board.progress == view.progress == Progress(0, 150)
    view.close()


def test_no_byte_is_lost_among_threads(board: Board) -> None:
    def advance(stage: int) -> None:
        for _ in range(2000):
            board.advance(stage, 1)

    threads = [threading.Thread(target=advance, args=(n % 3,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.progress.done == 8000


def test_whoever_has_the_descriptor_can_only_read(board: Board) -> None:
    fd = os.dup(board.fd)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    for size in (0, mmap.PAGESIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)
    board.advance(0, 1)  # its owner can still write


def test_a_plan_of_many_stages_takes_more_pages() -> None:
    board = Board([1] * 1000)
    view = BoardView(os.dup(board.fd))
    board.settle(999, StageState.READY)
    assert view.stages == 1000
    assert view.state(999) is StageState.READY
    assert view.state(998) is StageState.PENDING
    view.close()
    board.close()


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "0 bytes"),
        (b"CFBOARD1", "8 bytes"),
        (b"CFBOARD1" + (2).to_bytes(8, "little") + bytes(mmap.PAGESIZE - 16), ", 2"),
        (b"CFBOARD0" + (1).to_bytes(8, "little") + bytes(mmap.PAGESIZE - 16), ", 1"),
        (bytes(mmap.PAGESIZE), "0x0, 0"),
    ],
    ids=["empty", "cut", "version", "magic", "zeros"],
)
def test_what_is_no_board_is_refused(content: bytes, got: str) -> None:
    before = open_fds()
    fd = os.memfd_create("no-board")
    os.write(fd, content)
    with pytest.raises(ArenaError, match="no board of this version") as caught:
        BoardView(fd)
    assert caught.value.got is not None
    assert got in caught.value.got
    assert caught.value.expected == f"magic {int.from_bytes(b'CFBOARD1', 'little'):#x}, version 1"
    assert open_fds() == before  # it is closed in any case


def test_the_descriptor_does_not_pass_an_exec(board: Board) -> None:
    assert fcntl.fcntl(board.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
