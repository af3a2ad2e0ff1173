"""Whether an answer holds what was asked for: these bytes, of this version of the file.

RFC 9110: 13.1.1 `If-Match`, 14.4 `Content-Range`, 15.3.7 status 206.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coldframe.loader.errors import CheckpointError, SourceChanged, SourceError, SourceProtocol
from coldframe.loader.web.head import Head

__all__ = [
    "check_part",
    "check_version",
    "check_whole",
    "condition",
    "content_range",
    "size_behind",
    "too_large",
    "unasked",
    "version_of",
]

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_DATE = "modified "


def version_of(head: Head) -> str:
    """What changes when the file does: its ETag, else when it was modified; else empty."""
    etag = head.headers.get("etag")
    if etag:
        return etag
    modified = head.headers.get("last-modified")
    return f"{_DATE}{modified}" if modified else ""


def condition(version: str) -> dict[str, str]:
    """The header that makes a server refuse another version.

    A weak ETag (`W/`) never matches there; for those, and for servers that do not look, each
    answer's own version is compared.
    """
    if version.startswith('"'):
        return {"If-Match": version}
    if version.startswith(_DATE):
        return {"If-Unmodified-Since": version.removeprefix(_DATE)}
    return {}


def check_version(head: Head, version: str, where: str) -> None:
    """That the answer is of the version that was read first.

    Raises:
        SourceChanged: It is not.
    """
    found = version_of(head)
    if version and (found != version or head.status == 412):
        got = f"another (status {head.status})" if found == version else found or "none"
        raise SourceChanged(
            "a file was changed while it was loaded", where=where, expected=version, got=got
        )


def check_part(head: Head, first: int, last: int, size: int | None, where: str) -> int:
    """That an answer with status 206 holds exactly a range.

    Args:
        head: The answer.
        first: The first byte asked for.
        last: The last; it may lie behind the file's end where `size` is not known.
        size: The file's, if known.
        where: The file and the range.

    Returns:
        The file's size.

    Raises:
        SourceProtocol: It holds something else.
    """
    found = content_range(head)
    total = found[2] if found else size
    # Sizes differ, but for a changed file the version would: this is no server to be trusted.
    expected = None if total is None else (first, min(last, total - 1), size or total)
    if found is None or found != expected:
        raise SourceProtocol(
            "the server sent another range than it was asked for",
            where=where,
            expected=f"bytes {first}-{last}/{'...' if size is None else size}",
            got=f"Content-Range: {head.headers.get('content-range', 'none'):.80}",
        )
    length = found[1] - found[0] + 1
    if head.length is None and "transfer-encoding" in head.headers:
        raise _wrong_length(where, length, "chunks")
    if head.length is not None and head.length != length:
        raise _wrong_length(where, length, f"{head.length} bytes")
    return found[2]


def check_whole(head: Head, size: int, where: str) -> None:
    """That an answer with status 200 holds all of a file, where that was asked for.

    Raises:
        SourceProtocol: It does not say so.
    """
    if head.length != size:
        raise _wrong_length(where, size, "chunks" if head.length is None else f"{head.length}")


def content_range(head: Head) -> tuple[int, int, int] | None:
    """First byte, last byte and the file's size; None where it does not say all three."""
    match = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


def size_behind(headers: Mapping[str, str]) -> int | None:
    """The file's size as status 416 tells it."""
    match = re.fullmatch(r"bytes \*/(\d{1,18})", headers.get("content-range", ""), re.ASCII)
    return None if match is None else int(match[1])


def too_large(where: str, limit: int, got: str) -> CheckpointError:
    """The error for a small file that is not small."""
    return CheckpointError(
        "a file is too large to be what its name says",
        where=where,
        expected=f"at most {limit} bytes",
        got=got,
    )


def unasked(head: Head, where: str, size: int | None = None) -> SourceError:
    """The error for an answer that is a success, but not the one to what was asked."""
    if head.status == 416:
        expected = None if size is None else f"{size} bytes, as it had before"
        found = size_behind(head.headers)
        got = "fewer" if found is None else f"{found}"
        return SourceChanged(
            "a file was cut while it was loaded", where=where, expected=expected, got=got
        )
    if head.status == 200:
        return SourceProtocol(
            "the server does not send ranges",
            where=where,
            expected="status 206 with the bytes asked for",
            got="status 200 with the whole file",
            hint="Use a server that knows the Range header, with no proxy before it that drops it.",
        )
    return SourceProtocol(
        "the server sent a range that nobody asked for", where=where, got=f"status {head.status}"
    )


def _wrong_length(where: str, expected: int, got: str) -> SourceProtocol:
    return SourceProtocol(
        "the answer has another length than it says",
        where=where,
        expected=f"Content-Length: {expected}",
        got=got,
    )
