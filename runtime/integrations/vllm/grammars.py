"""Grammars of requests, compiled beside the steps of an engine.

What vLLM does with a schema before a request waits for its turn it does where the engine steps: it
reads the schema to see whether it can be, and looks at the whole vocabulary for the first of them.
The compiling itself it gives to a few threads, and waits for them without an end. Here all of that
is done in threads of a low priority, within a limit of time; the engine then finds the grammar in
xgrammar's cache. Nothing can stop what has exceeded its limit: so many may go on, and as long as
they do nobody else's is begun.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldframe.loader.errors import ColdframeError, ReplicaError, RequestError
from coldframe.runtime.integrations.vllm.engine import Engine
from coldframe.runtime.integrations.vllm.params import Asked, refusal

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

__all__ = ["LIMIT_S", "Grammars"]

LIMIT_S = 30.0
"""From when a request comes until its grammar is there, in seconds."""
_AT_ONCE = 2
_MOST = 4
"""Threads, with those whose requests are over."""
_NICE = 5


@dataclass(eq=False, slots=True)
class _Task:
    """A grammar that is to be compiled, until some moment, for a request."""

    request: str
    asked: Asked
    until: float


class Grammars:
    """The requests that wait for their grammars. For one thread, but for what it says itself.

    Args:
        engine: Whose they are to be.
        news: Called from another thread when a grammar is there.
        limit_s: See `LIMIT_S`.
    """

    def __init__(self, engine: Engine, news: Callable[[], None], limit_s: float = LIMIT_S) -> None:
        self._engine = engine
        self._news = news
        self._limit_s = limit_s
        self._tasks: dict[str, _Task] = {}
        self._queue: deque[_Task] = deque()
        self._begun: set[_Task] = set()
        """Those that have a thread still, be their requests over or not."""
        self._made: queue.SimpleQueue[tuple[_Task, EngineCoreRequest | ColdframeError]] = (
            queue.SimpleQueue()
        )

    def __len__(self) -> int:
        return len(self._tasks)

    def begin(self, request: str, asked: Asked) -> None:
        """Has a request's grammar compiled; `ready` has what comes of it."""
        task = _Task(request, asked, time.monotonic() + self._limit_s)
        self._tasks[request] = task
        self._queue.append(task)
        self._start()

    def forget(self, request: str) -> None:
        """A request is over."""
        task = self._tasks.pop(request, None)
        if task is not None and task in self._queue:
            self._queue.remove(task)

    def ready(self) -> list[tuple[str, EngineCoreRequest | ColdframeError]]:
        """The requests that the engine can take now, and those that it cannot, and why."""
        found: list[tuple[str, EngineCoreRequest | ColdframeError]] = []
        while not self._made.empty():
            task, made = self._made.get()
            self._begun.discard(task)
            if self._tasks.get(task.request) is task:
                del self._tasks[task.request]
                found.append((task.request, made))
        moment = time.monotonic()
        for task in [task for task in self._tasks.values() if task.until < moment]:
            found.append((task.request, self._too_late(task)))
            self.forget(task.request)
        self._start()
        return found

    def _too_late(self, task: _Task) -> ColdframeError:
        if task in self._begun:
            return RequestError(
                "the form asked for the answer takes too long to compile",
                where="structured",
                expected=f"at most {self._limit_s:g} s",
                hint="Ask for a simpler one: fewer parts, smaller counts.",
            )
        return ReplicaError(
            "the forms that others have asked for take too long to compile",
            where="structured",
            expected=f"a turn within {self._limit_s:g} s",
            hint="Ask again later.",
        )

    def _start(self) -> None:
        wanted = set(self._tasks.values())
        while self._queue and len(self._begun) < _MOST and len(self._begun & wanted) < _AT_ONCE:
            task = self._queue.popleft()
            self._begun.add(task)
            threading.Thread(target=self._run, args=[task], name="grammar", daemon=True).start()

    def _run(self, task: _Task) -> None:
        # xgrammar's own threads inherit that.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        made: EngineCoreRequest | ColdframeError
        try:
            made = self._engine.checked(task.request, task.asked)
            self._engine.compile_grammar(made)
        except ColdframeError as error:
            made = error
        except Exception as error:  # noqa: BLE001 - xgrammar's have no common type
            made = refusal(error)
        self._made.put((task, made))
        self._news()
