"""The lines of a batch that are still to be answered, in the file's order.

Those that have their answer are passed over, those that are wrong get theirs at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from coldframe.runtime.batch.input import BatchLine, LineReader, parse_line
from coldframe.runtime.batch.output import Answers, name_key
from coldframe.runtime.gateway.api import ApiError

__all__ = ["Intake", "Tally"]


@dataclass(slots=True)
class Tally:
    """What has happened to a batch's lines, this time.

    Args:
        lines: Lines read; blank ones do not count.
        skipped: Answered before.
        answered: Answered now.
        refused: Answered now, with an error.
        prompt_tokens: Of those that were answered.
        completion_tokens: Likewise.
    """

    lines: int = 0
    skipped: int = 0
    answered: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def unanswered(self) -> int:
        """Lines that were read and have no answer: it was not waited for."""
        return self.lines - self.skipped - self.answered - self.refused


class Intake:
    """What is still to be answered.

    Args:
        reader: The input.
        answers: What is answered, and gets the answers of lines that are wrong.
        tally: Counts.
    """

    def __init__(self, reader: LineReader, answers: Answers, tally: Tally) -> None:
        self._reader = reader
        self._answers = answers
        self._tally = tally
        self._seen: set[bytes] = set()
        self._first: BatchLine | None = None

    @property
    def ended(self) -> bool:
        """Whether there are no more lines."""
        return self._first is None and self._reader.ended

    @property
    def blocked(self) -> bool:
        """Whether there is no line yet: wait for `fd`."""
        return self._reader.blocked

    @property
    def fd(self) -> int:
        return self._reader.fd

    @property
    def first(self) -> BatchLine | None:
        """The line that `any` has found, until it is taken."""
        return self._first

    def any(self) -> bool:
        """Waits for the first line to be answered; whether there is one at all.

        Raises:
            ColdframeError: The input cannot be read, or an answer cannot be written.
        """
        while not self.ended:
            self._first = self.next()
            if self._first is not None:
                return True
            if self.blocked:
                self._reader.wait()
        return False

    def next(self) -> BatchLine | None:
        """Looks at one line, and returns it if it is to be answered.

        Returns:
            None where it needs nothing more, where there is none yet (`blocked`), and at the end.

        Raises:
            ColdframeError: The input cannot be read, or an answer cannot be written.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        raw = self._reader.next()
        if raw is None or (isinstance(raw, bytes) and not raw.strip()):
            return None
        self._tally.lines += 1
        line = parse_line(self._reader.number, raw)
        if line.custom_id is not None:
            key = name_key(line.custom_id)
            if key in self._seen:
                self._refuse(_repeated(line))
                return None
            self._seen.add(key)
            if key in self._answers.names:
                self._answers.names.discard(key)  # it is in `_seen` now, and once is enough
                self._tally.skipped += 1
                return None
        if line.error is None:
            return line
        self._refuse(line)
        return None

    def _refuse(self, line: BatchLine) -> None:
        assert line.error is not None
        if line.custom_id is None and line.number in self._answers.numbers:
            self._tally.skipped += 1
            return
        self._tally.refused += 1
        error = line.error
        self._answers.add(line.custom_id, line.number, error.status, error.to_openai())


def _repeated(line: BatchLine) -> BatchLine:
    """The same line without its name, which is another's, so that each stands in one answer."""
    error = ApiError(
        400,
        f"An earlier line has the custom_id {line.custom_id!r} already; each needs its own.",
        param="custom_id",
        code="duplicate_custom_id",
    )
    return BatchLine(line.number, error=error)
