from __future__ import annotations

import threading
from collections.abc import Callable

from coldframe.loader.web.concurrency import Limiter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Path:
    """Readers that always want more, on a path that carries what a function of them says."""

    def __init__(self, first: int, most: int, rate: Callable[[int], float]) -> None:
        self.clock = Clock()
        self.limiter = Limiter(first, most, self.clock)
        self.rate = rate
        # Waiting threads, without the threads: one that never gets its turn is enough.
        self.waiter = threading.Thread(target=self._wait)
        for _ in range(first):
            assert self.limiter.acquire()
        self.waiter.start()

    def _wait(self) -> None:
        while self.limiter.acquire():
            continue

    def run(self, seconds: float) -> int:
        for _ in range(round(seconds / 0.05)):
            self.clock.now += 0.05
            self.limiter.moved(int(self.rate(self.limiter.limit) * 0.05))
        return self.limiter.limit

    def close(self) -> None:
        self.limiter.close()
        self.waiter.join()


def settled(path: Path) -> None:
    """Until the waiter waits again."""
    while not path.limiter._waiting and path.limiter._running < path.limiter.limit + 1:
        threading.Event().wait(0.001)


def run(path: Path, seconds: float) -> int:
    for _ in range(round(seconds / 0.05)):
        settled(path)
        path.run(0.05)
    return path.limiter.limit


def test_grows_while_the_rate_grows() -> None:
    path = Path(4, 32, lambda n: 1e8 * n)
    try:
        assert run(path, 5) == 32
    finally:
        path.close()


def test_goes_back_where_more_bring_nothing() -> None:
    path = Path(4, 32, lambda n: 1e8 * min(n, 4))
    try:
        assert run(path, 1.2) == 4
    finally:
        path.close()


def test_stops_near_where_the_path_is_full() -> None:
    path = Path(2, 32, lambda n: 1e8 * min(n, 10))
    try:
        assert 8 <= run(path, 4) <= 17
    finally:
        path.close()


def test_does_not_grow_where_nobody_waits() -> None:
    clock = Clock()
    limiter = Limiter(4, 32, clock)
    for step in range(100):
        assert limiter.acquire()
        clock.now += 0.1
        limiter.moved(1000 * step)
        limiter.release()
    assert limiter.limit == 4
    assert limiter.peak == 1


def test_is_halved_once_for_all_refusals_of_a_moment() -> None:
    clock = Clock()
    limiter = Limiter(16, 32, clock)
    for _ in range(16):
        limiter.slow_down()
    assert limiter.limit == 8
    assert not limiter.calm
    clock.now += 2
    limiter.slow_down()
    assert limiter.limit == 4
    for _ in range(10):
        clock.now += 2
        limiter.slow_down()
    assert limiter.limit == 1
    clock.now += 60
    assert limiter.calm


def test_grows_again_after_a_rest() -> None:
    path = Path(8, 32, lambda n: 1e8 * n)
    try:
        path.limiter.slow_down()
        for _ in range(5):
            path.limiter.release()
        assert path.limiter.limit == 4
        assert run(path, 4) == 4
        assert run(path, 8) > 8
    finally:
        path.close()


def test_lets_in_by_order_and_what_is_urgent_first() -> None:
    limiter = Limiter(1, 1, Clock())
    assert limiter.acquire()
    order: list[str] = []

    def wait(name: str, urgent: bool) -> None:
        assert limiter.acquire(urgent=urgent)
        order.append(name)
        limiter.release()

    threads = []
    for number, (name, urgent) in enumerate([("a", False), ("b", False), ("first", True)]):
        threads.append(threading.Thread(target=wait, args=(name, urgent)))
        threads[-1].start()
        while len(limiter._waiting) <= number:
            threading.Event().wait(0.001)
    limiter.release()
    for thread in threads:
        thread.join()
    assert order == ["first", "a", "b"]
    assert limiter.peak == 1


def test_closing_sends_away_whoever_waits() -> None:
    limiter = Limiter(1, 1, Clock())
    assert limiter.acquire()
    got: list[bool] = []
    thread = threading.Thread(target=lambda: got.append(limiter.acquire()))
    thread.start()
    while not limiter._waiting:
        threading.Event().wait(0.001)
    limiter.close()
    thread.join()
    assert got == [False]
    assert not limiter.acquire()
