"""A worker's connection to the memory service: what comes is read by a thread, questions wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import ColdframeError, MemoryServiceGone, ReplicaError
from coldframe.loader.wire import Channel, Message

__all__ = ["Link"]

_ANSWERS = ("assigned", "claimed", "dropped", "brought")


class Link:
    """Reads all that the service sends, and tells whose question it answers.

    Args:
        channel: A connection to the service's socket. It is this object's to close.
        take: Given each message that is no answer, by the reading thread, with `changed` held.
        on_event: Called by that thread whenever something has changed.
        patience_s: How long an answer is waited for, in seconds.

    Attributes:
        changed: Held while anything changes that a message may change; notified behind that.
        error: Why nothing more will come, where that is so.
    """

    def __init__(
        self,
        channel: Channel,
        take: Callable[[Message], None],
        on_event: Callable[[], None],
        patience_s: float,
    ) -> None:
        self.changed = threading.Condition()
        self.error: ColdframeError | None = None
        self._channel = channel
        self._take = take
        self._on_event = on_event
        self._patience_s = patience_s
        self._clock = AwakeClock()
        self._asking = threading.Lock()
        self._answers: list[Message] = []
        self._reader = threading.Thread(target=self._read, name="memory-client", daemon=True)

    def start(self) -> None:
        """Reads from now on."""
        self._reader.start()

    def send(self, body: dict[str, Any]) -> None:
        """Sends a message that has no answer.

        Raises:
            ReplicaError: The service is gone.
        """
        self._channel.send(body)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            ColdframeError: There will be none; see `error`.
        """
        with self._asking:
            self._channel.send(body)
            deadline = self._clock() + self._patience_s
            with self.changed:
                while self.error is not None or not self._answers:
                    if self.error is not None:
                        raise self.error
                    if self._clock() >= deadline:
                        # For good: a late answer would be taken for that of the next question.
                        self.error = ReplicaError(
                            "the memory service does not answer", where=str(body["type"])
                        )
                        raise self.error
                    self.changed.wait(1.0)
                return self._answers.pop(0).body

    def hang_up(self) -> None:
        """Ends it; whoever waits for something gets an error. Any thread may do it."""
        self._channel.hang_up()

    def join(self) -> None:
        """Waits until no message is taken any more; behind `hang_up`, by another thread."""
        self._reader.join()

    def close(self) -> None:
        self._channel.close()

    def _read(self) -> None:
        lost = MemoryServiceGone("the memory service is gone")
        reason: ColdframeError = lost
        try:
            while (message := self._channel.recv()) is not None:
                answers = message.kind in _ANSWERS
                with self.changed:
                    self._answers.append(message) if answers else self._take(message)
                    self.changed.notify_all()
                if not answers:  # whoever asked waits for it already
                    self._on_event()
        except ColdframeError as error:
            reason = error
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            reason = ReplicaError("the memory service cannot be understood", got=repr(error))
        with self.changed:
            # The first cause is the one that tells.
            self.error = self.error or reason
            self.changed.notify_all()
        self._on_event()
