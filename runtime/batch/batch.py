"""A batch: so many sequences with a replica at once; a line is answered when all of its are done.

Answers are written in the order in which they are done. A replica that fails takes no line with it:
what it was at has no answer then, and gets one when the batch is started again.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.timeline import now
from coldframe.runtime.batch.input import CHAT, BatchLine
from coldframe.runtime.batch.intake import Intake, Tally
from coldframe.runtime.batch.output import Answers
from coldframe.runtime.batch.pieces import piece
from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.openai.answers import Document
from coldframe.runtime.gateway.openai.prepare import (
    Prepared,
    Render,
    prepare_chat,
    prepare_completion,
)
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["Batch"]

_TURN_S = 0.05
"""How long lines are read before the workers are heard again."""
_STEP_S = 0.5
"""How long it may take to see that the batch is to end, or that the disk is due."""


class _Work:
    """A line that is being answered."""

    def __init__(self, line: BatchLine, prepared: Prepared, card: ModelCard) -> None:
        self.line = line
        self.prepared = prepared
        kind = "cmpl" if prepared.kind == "completion" else "chatcmpl"
        name = f"{kind}-{os.urandom(12).hex()}"
        self.document = Document(prepared, card, id=name, created=int(time.time()))
        self.unsubmitted = deque(range(len(prepared.generations)))
        self.running: dict[int, str] = {}
        """The replica's name for each choice that it is at."""
        self.error: ColdframeError | None = None

    @property
    def done(self) -> bool:
        return not self.running and not self.unsubmitted


class _Choice:
    """Listens to one of a line's sequences."""

    def __init__(self, batch: Batch, work: _Work, index: int) -> None:
        self._batch = batch
        self._work = work
        self._index = index

    def on_token(self, event: TokenEvent) -> None:
        self._work.document.add(piece(self._index, event))
        self._batch.token()
        if event.finish is not None:
            self._batch.ended(self._work, self._index)

    def on_error(self, error: ColdframeError) -> None:
        self._work.error = self._work.error or error
        self._batch.ended(self._work, self._index)


class Batch:
    """The lines that are being answered.

    Args:
        replica: Who answers.
        card: Its model.
        render: Fills in a chat template.
        intake: The lines.
        answers: Where their answers go.
        tally: Counts.
        concurrency: Sequences that the replica has at once.
    """

    def __init__(
        self,
        replica: Replica,
        card: ModelCard,
        render: Render,
        intake: Intake,
        answers: Answers,
        tally: Tally,
        concurrency: int,
    ) -> None:
        self._replica = replica
        self._card = card
        self._render = render
        self._intake = intake
        self._answers = answers
        self._tally = tally
        self._concurrency = concurrency
        self._works: list[_Work] = []
        self._ended: deque[_Work] = deque()
        self.running = 0
        """Sequences that the replica has."""
        self.first_token_ns: int | None = None
        self.tokens = 0
        """Tokens that have come, also of lines that are not answered yet."""

    def follow(self, drain: Callable[[], float | None], on_step: Callable[[], None]) -> None:
        """Answers all lines.

        Args:
            drain: None, or how many seconds are left because the batch is to end: then no further
                line is begun, and what has no answer when they are over gets none.
            on_step: Called whenever something has happened, and now and then.

        Raises:
            ColdframeError: The replica cannot go on, the input cannot be read, or an answer cannot
                be written. What was written is whole.
        """
        while not self._over(left := drain()):
            more = left is None and self._fill()
            hungry = left is None and self._intake.blocked and self.running < self._concurrency
            self._poll(0.0 if more else min(_STEP_S, left or _STEP_S), hungry)
            self._conclude()
            self._answers.sync_if_due()
            on_step()
        for work in self._works:
            self._cancel(work)
        self._answers.sync()

    def token(self) -> None:
        """A token has come."""
        self.tokens += 1
        if self.first_token_ns is None:
            self.first_token_ns = now()

    def ended(self, work: _Work, index: int) -> None:
        """One of a line's sequences has ended."""
        del work.running[index]
        self.running -= 1
        if work.done or work.error is not None:
            self._ended.append(work)

    def _over(self, left: float | None) -> bool:
        if left is not None:
            return left <= 0 or not self._works
        return not self._works and self._intake.ended

    # -- lines to the replica --------------------------------------------------------------------

    def _fill(self) -> bool:
        """Gives the replica what it has room for; whether there may be more at once."""
        late = time.monotonic() + _TURN_S
        while self.running < self._concurrency:
            if self._works and self._works[-1].unsubmitted:
                self._submit(self._works[-1])
                continue
            if time.monotonic() > late:
                return True
            line = self._intake.next()
            if line is not None:
                self._begin(line)
            elif self._intake.blocked or self._intake.ended:
                return False
        return False

    def _begin(self, line: BatchLine) -> None:
        try:
            self._works.append(_Work(line, self._prepare(line), self._card))
        except ApiError as error:
            if error.status >= 500:  # not of the line's making: it is to have a real answer
                raise ReplicaError(
                    "a line cannot be prepared", where=f"line {line.number}", got=error.message
                ) from error
            self._refuse(line, error)

    def _prepare(self, line: BatchLine) -> Prepared:
        """Raises ApiError where the body is refused."""
        body = line.body or {}
        model = body.get("model")
        if isinstance(model, str) and model != self._card.name:
            raise ApiError(
                404,
                f"The model {model[:200]!r} does not exist. This one is {self._card.name!r}.",
                param="model",
                code="model_not_found",
            )
        if line.url == CHAT:
            return prepare_chat(body, self._card, self._render)
        return prepare_completion(body, self._card)

    def _submit(self, work: _Work) -> None:
        index = work.unsubmitted.popleft()
        generation = work.prepared.generations[index]
        prompt = generation.prompt
        work.running[index] = self._replica.submit(
            generation.params,
            _Choice(self, work, index),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=None if isinstance(prompt, str) else prompt,
            add_special=generation.add_special,
        )
        self.running += 1

    def _poll(self, timeout: float, hungry: bool) -> None:
        """Hears what has happened, at the replica, or at an input that had no line yet."""
        if hungry:
            self._replica.loop.watch(self._intake.fd, lambda: None)
        try:
            self._replica.poll(timeout)
        finally:
            if hungry:
                self._replica.loop.unwatch(self._intake.fd)

    # -- answers ---------------------------------------------------------------------------------

    def _conclude(self) -> None:
        """Writes the answers of what has ended.

        Raises:
            ColdframeError: The replica cannot go on, or an answer cannot be written.
        """
        failure = self._replica.error
        while self._ended:
            work = self._ended.popleft()
            if work not in self._works:
                continue  # another of its sequences has failed before
            if work.error is None:
                self._answer(work)
            elif failure is None:
                self._cancel(work)
                self._refuse(work.line, ApiError.of(work.error))
            self._works.remove(work)
        if failure is not None:
            raise failure

    def _cancel(self, work: _Work) -> None:
        work.unsubmitted.clear()
        for name in work.running.values():
            self._replica.cancel(name)
        self.running -= len(work.running)
        work.running.clear()

    def _answer(self, work: _Work) -> None:
        body = work.document.finish()
        self._tally.answered += 1
        self._tally.prompt_tokens += body["usage"]["prompt_tokens"]
        self._tally.completion_tokens += body["usage"]["completion_tokens"]
        self._answers.add(work.line.custom_id, work.line.number, 200, body)

    def _refuse(self, line: BatchLine, error: ApiError) -> None:
        self._tally.refused += 1
        self._answers.add(line.custom_id, line.number, error.status, error.to_openai())
