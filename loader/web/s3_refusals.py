"""What S3 means when it says no: its error documents, as errors that say what to do.

Only the code, the message, the region and the clocks are taken from a document. It also quotes the
request, signature and access key included, and that must never reach an error.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from coldframe.loader.errors import (
    SourceChanged,
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.web.address import Again, Refusal

__all__ = ["Answer", "clean"]

_MAX_TEXT = 400

_KNOWN = frozenset(HTTPStatus)
_MOVED_STATUS = {301, 302, 307, 308}
_MOVED = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_BUSY_STATUS = {429, 503}
_AGAIN_STATUS = {408, 429, 500, 502, 503, 504}
_AGAIN = {"RequestTimeout", "RequestTimeoutException", "OperationAborted", "InternalError"}
_BUSY = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_STALE = {
    "ExpiredToken": "the credentials have expired",
    "InvalidAccessKeyId": "there is no such access key",
    "InvalidToken": "the session token is not valid",
    "TokenRefreshRequired": "the session token must be renewed",
}
_STALE_HINTS = {
    "ExpiredToken": "Log in again or renew the role's session, then start again.",
    "InvalidAccessKeyId": (
        "Check AWS_ACCESS_KEY_ID or the profile, and AWS_ENDPOINT_URL: a key of one store is "
        "unknown to another."
    ),
}
_TOKEN_HINT = "Set AWS_SESSION_TOKEN to the one that belongs to the key, or log in again."
_EXPECT_CLOCK = "clocks at most 15 minutes apart"


@dataclass(frozen=True, slots=True)
class Answer:
    """S3's answer to a request that it did not fulfil.

    Attributes:
        what: What was asked for.
        host: Who answered.
        status: The HTTP status.
        code: S3's own code, or the HTTP reason where there is none.
        message: S3's own text; without what must not be shown.
        region: Where the bucket is, if S3 says so.
        request_id: What S3's operators ask for.
        after_s: For how long it wants to be left alone, if it says so.
        clocks: The request's time and the server's, where S3 names them.
    """

    what: str
    host: str
    status: int
    code: str
    message: str
    region: str | None
    request_id: str | None
    after_s: float | None
    clocks: tuple[str, str] | None

    @staticmethod
    def read(refusal: Refusal, *, hidden: Iterable[str] = ()) -> Answer:
        """Reads an answer's head and body.

        Args:
            refusal: The answer.
            hidden: What must not be shown, even where the message has it.
        """
        # Patterns and no XML parser: nothing here is nested, and there are no entities to expand.
        text = refusal.body[: 64 << 10].decode("utf-8", "replace")
        hidden = list(hidden)
        message = clean(_element(text, "Message") or "", hidden)
        expecting = re.search(r"expecting '([a-z0-9-]+)'", message)
        region = (
            refusal.headers.get("x-amz-bucket-region")
            or _element(text, "Region")
            or (expecting and expecting[1])
            or None
        )
        request_time, server_time = _element(text, "RequestTime"), _element(text, "ServerTime")
        location = _place_in(refusal.headers.get("location"))
        if not message and location:
            message = f"it sends the request to {location}"
        after = refusal.headers.get("retry-after", "")
        request_id = refusal.headers.get("x-amz-request-id") or _element(text, "RequestId")
        return Answer(
            refusal.what,
            refusal.target.host,
            refusal.status,
            clean(_element(text, "Code") or _phrase(refusal), hidden),
            message,
            region if region and re.fullmatch(r"[a-z0-9-]{1,64}", region) else None,
            request_id and clean(request_id, hidden),
            float(after) if re.fullmatch(r"\d{1,6}", after) else None,
            (clean(request_time), clean(server_time)) if request_time and server_time else None,
        )

    def __str__(self) -> str:
        text = f"{self.status} {self.code}"
        if self.message:
            text += f": {self.message.rstrip('.')}"
        if self.request_id:
            text += f" (request {self.request_id})"
        return text

    @property
    def moved(self) -> bool:
        """Whether it says that the bucket is in another region."""
        if self.code == "AuthorizationHeaderMalformed":
            return self.region is not None  # without one, it is something else about the header
        return self.status in _MOVED_STATUS or self.code in _MOVED

    @property
    def stale_credentials(self) -> bool:
        """Whether other credentials may help."""
        return self.code in _STALE

    @property
    def again(self) -> Again | None:
        """That the same request may fare better another time, where it may."""
        busy = self.status in _BUSY_STATUS or self.code in _BUSY
        if busy or self.status in _AGAIN_STATUS or self.code in _AGAIN:
            return Again(str(self), after_s=self.after_s, slow_down=busy)
        return None

    def error(self, bucket: str) -> SourceError:
        """The error that it comes to."""
        return self._credentials_error() or self._object_error(bucket)

    def _credentials_error(self) -> SourceCredentials | None:
        if self.code in _STALE:
            hint = _STALE_HINTS.get(self.code, _TOKEN_HINT)
            return SourceCredentials(_STALE[self.code], where=self.what, got=str(self), hint=hint)
        if self.code == "SignatureDoesNotMatch":
            return SourceCredentials(
                "the request's signature is not what the store computes",
                where=self.what,
                got=str(self),
                hint=(
                    "The secret key does not belong to the access key (check both, for blanks and "
                    "line ends too), or a proxy has rewritten the request."
                ),
            )
        if self.code == "RequestTimeTooSkewed":
            ours, theirs = self.clocks or ("", "")
            return SourceCredentials(
                "this machine's clock is wrong, so that no signature is valid",
                where=self.what,
                expected=f"the server's time, {theirs}" if theirs else _EXPECT_CLOCK,
                got=f"{ours} here" if ours else str(self),
                hint="Set the clock: let chrony or systemd-timesyncd keep it.",
            )
        if self.status == 401 or self.code == "InvalidSecurity":
            return SourceCredentials("the credentials are refused", where=self.what, got=str(self))
        return None

    def _object_error(self, bucket: str) -> SourceError:
        where, got = self.what, str(self)
        if self.code in {"InvalidObjectState", "ObjectArchived"}:
            return SourceError(
                "the object is archived",
                where=where,
                got=got,
                hint="Restore it from Glacier (aws s3api restore-object), or copy the model to a "
                "storage class that can be read at once.",
            )
        if self.status == 403:
            if "KMS" in self.code or "kms:" in self.message:
                hint = "Check the bucket's policy, and the key's where objects are encrypted."
            else:
                hint = (
                    "Allow s3:GetObject on it to the credentials in use. Where s3:ListBucket is "
                    "not allowed, S3 says this of an object that is not there too: check the key."
                )
            return SourceDenied("the store denies access", where=where, got=got, hint=hint)
        if self.code == "NoSuchBucket":
            return SourceNotFound(
                f"there is no bucket {bucket!r}",
                where=where,
                got=f"{got} from {self.host}",
                hint="Check the bucket's name, and AWS_ENDPOINT_URL if the store is not AWS.",
            )
        if self.status == 404:
            return SourceNotFound(
                "there is no such object",
                where=where,
                got=got,
                hint="Check the prefix; keys distinguish upper and lower case.",
            )
        if self.status == 412:
            return SourceChanged("the object was replaced while it was read", where=where, got=got)
        return SourceError(
            "the store refuses the request",
            where=where,
            got=got,
            hint="Its code and message say why; the store's documentation explains them.",
        )


def clean(text: str, hidden: Iterable[str] = ()) -> str:
    """A text from outside as one line of bounded length, without what must not be shown."""
    for secret in hidden:
        text = text.replace(secret, "***")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _element(text: str, name: str) -> str | None:
    match = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return html.unescape(match[1]).strip() if match else None


def _phrase(refusal: Refusal) -> str:
    if refusal.reason:
        return refusal.reason
    return HTTPStatus(refusal.status).phrase if refusal.status in _KNOWN else "Unknown"


def _place_in(location: str | None) -> str | None:
    """Scheme and host of a `Location`: its query may hold a signature."""
    if not location:
        return None
    try:
        parts = urlsplit(location)
        return f"{parts.scheme}://{parts.hostname}" if parts.hostname else None
    except ValueError:
        return None
