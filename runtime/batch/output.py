"""A batch's answers, in a file that always says how far the batch has come.

An answer is one line and written in one go, so a batch that was killed leaves whole lines and at
most one torn one behind them, which is cut off when the next one starts. An answer with a
`custom_id` is that line's only one; what could not be told by one says the number of its line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, BinaryIO

from coldframe.loader.errors import PlatformError, RequestError, SourceError

__all__ = ["Answers", "name_key"]

_SYNC_S = 1.0
_HEAD = 64 << 10
"""Bytes that hold all of an answer that has no `custom_id`, and of others the `custom_id`."""
_SKIP = 1 << 20
_START = b'{"id": "batch_req_'
_LINE = re.compile(
    rb'\{"id": ?"batch_req_[0-9a-f]+", ?"custom_id": ?(null|"(?:[^"\\]|\\.)*"), ?"response": ?\{'
)
_OTHER_FILE = "Name another file for the answers, or one that a batch has begun."


def name_key(custom_id: str) -> bytes:
    """What is kept of a `custom_id`: 16 bytes, however long it is."""
    return blake2b(custom_id.encode(), digest_size=16).digest()


class Answers:
    """The file of a batch's answers, locked, with what it has already.

    Args:
        path: Where it is, or will be.
        source: The input's status: it must be another file.

    Raises:
        SourceError: It cannot be opened, locked or read.
        RequestError: It is none that answers can be added to.
    """

    def __init__(self, path: str, source: os.stat_result) -> None:
        self.path = path
        self.names: set[bytes] = set()
        """Keys of the lines that are answered, by `custom_id`."""
        self.numbers: set[int] = set()
        """Numbers of those that have none."""
        self._unsynced = False
        self._synced_at = time.monotonic()
        self._fd = _open(path)
        try:
            self._check(source)
            self._lock()
            self._size = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, custom_id: str | None, number: int, status: int, body: Mapping[str, Any]) -> None:
        """Writes the answer of one line.

        Args:
            custom_id: The line's, where it has one that no other line has.
            number: The line's, from 1; it goes into the error of one that has no `custom_id`.
            status: As HTTP's.
            body: The answer, or OpenAI's `{"error": {...}}`.

        Raises:
            PlatformError: It cannot be written. What was written before is whole.
        """
        if custom_id is None:
            body = {"error": {**body["error"], "line": number}}
        unique = os.urandom(12).hex()
        document = {
            "id": f"batch_req_{unique}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req_{unique}", "body": body},
            "error": None,
        }
        # What has no UTF-8, a lone surrogate, is escaped, and then it is JSON as well.
        text = json.dumps(document, ensure_ascii=False)
        self._write(f"{text}\n".encode("utf-8", "backslashreplace"))

    def sync_if_due(self) -> None:
        """Has the disk take what was written, at most once a second."""
        if time.monotonic() - self._synced_at >= _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Has the disk take what was written.

        Raises:
            PlatformError: It does not.
        """
        self._synced_at = time.monotonic()
        if self._unsynced:
            self._unsynced = False
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Has the disk take all, and lets another batch go on."""
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            # Half a line is none. Should this fail too, the next batch cuts it off.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise self._unwritable(error) from error
        self._size += len(line)
        self._unsynced = True

    def _unwritable(self, error: OSError) -> PlatformError:
        return PlatformError(
            "an answer cannot be written",
            where=self.path,
            got=error.strerror,
            hint="Make room or mend the disk, then start the same batch again: it goes on there.",
        )

    # -- what is there already -------------------------------------------------------------------

    def _check(self, source: os.stat_result) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise RequestError(
                "the answers need a file",
                where=self.path,
                expected="a regular file",
                got=stat.filemode(status.st_mode),
                hint=_OTHER_FILE,
            )
        if os.path.samestat(status, source):
            raise RequestError(
                "input and answers are the same file", where=self.path, hint=_OTHER_FILE
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise RequestError(
                    "another batch writes to this file",
                    where=self.path,
                    hint="Wait until it is done, or name another file for the answers.",
                ) from None
            raise SourceError(
                "the file of the answers cannot be locked",
                where=self.path,
                got=error.strerror,
                hint="Put it where files can be locked.",
            ) from None

    def _recover(self) -> int:
        """Reads what is answered, and cuts off a torn end: the size of what stays."""
        size = 0
        try:
            with open(self._fd, "rb", _SKIP, closefd=False) as file:
                while head := file.readline(_HEAD):
                    length, last = _rest_of_line(file, head)
                    if last != b"\n":
                        self._cut(head, size)
                        break
                    self._note(head, size)
                    size += length
        except OSError as error:
            raise SourceError(
                "the file of the answers cannot be read", where=self.path, got=error.strerror
            ) from error
        return size

    def _note(self, head: bytes, offset: int) -> None:
        match = _LINE.match(head)
        if match is not None:
            if match[1] != b"null":
                self.names.add(name_key(json.loads(match[1])))
                return
            with contextlib.suppress(ValueError, KeyError, TypeError):
                number = json.loads(head)["response"]["body"]["error"]["line"]
                if isinstance(number, int):
                    self.numbers.add(number)
                    return
        raise self._foreign(head, offset)

    def _cut(self, head: bytes, offset: int) -> None:
        # A file that nobody has begun as a batch's answers is not for us to empty.
        if offset == 0 and not (head.startswith(_START) or _START.startswith(head)):
            raise self._foreign(head, offset)
        os.ftruncate(self._fd, offset)

    def _foreign(self, head: bytes, offset: int) -> RequestError:
        shown = repr(head[:60])[1:] + ("..." if len(head) > 60 else "")
        return RequestError(
            "this file has a line that is no answer of a batch",
            where=f"{self.path}, byte {offset}",
            expected=f"lines that begin with {_START.decode()}",
            got=shown,
            hint=_OTHER_FILE,
        )


def _open(path: str) -> int:
    # Not blocking: nobody may ever read from a FIFO.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        raise RequestError(
            "the file of the answers cannot be opened",
            where=path,
            got=error.strerror if isinstance(error, OSError) else error,
            hint=_OTHER_FILE,
        ) from None


def _rest_of_line(file: BinaryIO | io.BufferedReader, head: bytes) -> tuple[int, bytes]:
    """Reads on to the end of a line: its length in bytes, and its last byte."""
    length, part = len(head), head
    while not part.endswith(b"\n"):
        part = file.readline(_SKIP)
        if not part:
            return length, b""
        length += len(part)
    return length, part[-1:]
