"""S3: where a bucket's objects are asked for, and how each request is signed.

botocore is asked once where the bucket is (`s3_session`); after that a request costs its signature
alone, 0.04 ms where a call of the client costs 1 ms. Signatures go into headers, never into a URL,
where they would be logged.

What S3's refusals mean is told in `s3_refusals`; its checksums are used in `s3_checksums`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from coldframe.loader.errors import SourceElsewhere
from coldframe.loader.sources.location import S3
from coldframe.loader.throttle import Throttle
from coldframe.loader.web.address import Again, Refusal, Target
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.origin import WebOrigin
from coldframe.loader.web.ranges import RangeReader
from coldframe.loader.web.s3_refusals import Answer
from coldframe.loader.web.s3_session import UNSIGNED_VARIABLE, Place, S3Session

if TYPE_CHECKING:
    from coldframe.loader.web.s3_checksums import Fetch, Mended, S3Checksums
    from coldframe.loader.web.s3_stored import StoredShard

__all__ = ["S3Address", "s3_origin"]

_SIGNED = re.compile(r"Credential=(?P<key>.+)/\d{8}/(?P<region>[^/]+)/s3/aws4_request")


def s3_origin(
    location: S3, throttle: Throttle | None = None, *, limits: Limits | None = None
) -> WebOrigin:
    """A checkpoint in a bucket, checked against the checksums that S3 keeps.

    Args:
        location: Bucket and prefix.
        throttle: A limit on the rate.
        limits: Patience and concurrency.
    """
    address = S3Address(location)
    reader = RangeReader(
        address, throttle=throttle, limits=limits, ca_file=lambda: address.ca_bundle
    )
    return WebOrigin(reader, address.checksums)


class S3Address:
    """A checkpoint in a bucket of S3, or of a store that speaks its protocol.

    Nothing is imported, read or asked before the first request. Safe for several threads.

    Args:
        location: Bucket and prefix; the prefix is taken as it stands, a `%` is a `%`.
        environ: Where `COLDFRAME_S3_UNSIGNED` is looked up; botocore looks in the process's own.
    """

    def __init__(self, location: S3, *, environ: Mapping[str, str] = os.environ) -> None:
        self._location = location
        self._prefix = f"{location.prefix}/" if location.prefix else ""
        self._unsigned = environ.get(UNSIGNED_VARIABLE, "").lower() in {"1", "true", "yes", "on"}
        self._lock = threading.Lock()
        self._known: tuple[S3Session, Place] | None = None
        self._followed = False

    def __repr__(self) -> str:
        return f"S3Address({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._location.uri

    def uri_of(self, name: str) -> str:
        return f"s3://{self.bucket}/{self.key(name)}"

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._location.bucket

    def key(self, name: str) -> str:
        """The key of a file of it."""
        return self._prefix + name

    @property
    def region(self) -> str:
        """The region that requests are signed for.

        Raises:
            SourceError: It cannot be known, for the reasons that `target` has.
        """
        return self._ready()[1].region

    @property
    def client(self) -> Any:
        """botocore's client, for what is not a range.

        Raises:
            SourceError: There can be none, for the reasons that `target` has.
        """
        return self._ready()[1].client

    @property
    def ca_bundle(self) -> str | None:
        """The file of certificates to trust that `AWS_CA_BUNDLE` or the profile names, if any.

        Raises:
            SourceError: The configuration cannot be read.
        """
        return self._ready()[0].ca_bundle

    def target(self, name: str, headers: Mapping[str, str]) -> Target:
        session, place = self._ready()
        path = place.base + quote(self.key(name), safe="/~")
        if self._unsigned:
            return Target(place.scheme, place.host, place.port, path, dict(headers))
        from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]
        from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]

        request = AWSRequest("GET", place.root + path, headers=dict(headers))
        S3SigV4Auth(session.frozen(), "s3", place.region).add_auth(request)
        return Target(place.scheme, place.host, place.port, path, dict(request.headers.items()))

    def refused(self, refusal: Refusal) -> Again:
        signature = _Signature.of(refusal.target)
        answer = Answer.read(refusal, hidden=signature.secrets)
        if answer.moved:
            return self._follow(answer, refusal.target.host, signature.region)
        if answer.stale_credentials:
            with self._lock:
                if self._ready_locked()[0].renewed(signature.key, signature.token):
                    return Again(f"{answer}; the credentials were renewed", at_once=True)
        if answer.again is not None:
            return answer.again
        raise answer.error(self.bucket)

    def checksums(
        self, shards: Sequence[StoredShard], fetch: Fetch, *, mended: Mended | None = None
    ) -> S3Checksums:
        """The check of what is read against the checksums that S3 keeps (see `S3Checksums`)."""
        from coldframe.loader.web.s3_checksums import S3Checksums
        from coldframe.loader.web.s3_stored import ask

        return S3Checksums(
            lambda shard: ask(self.client, self.bucket, self.key(shard.name), shard),
            shards,
            fetch,
            mended=mended,
            asked=self.close,
        )

    def close(self) -> None:
        """Closes the client's connections; used again, it makes new ones."""
        with self._lock:
            if self._known is not None:
                self._known[1].client.close()

    def _ready(self) -> tuple[S3Session, Place]:
        if self._known is not None:
            return self._known
        with self._lock:
            return self._ready_locked()

    def _ready_locked(self) -> tuple[S3Session, Place]:
        if self._known is None:
            session = S3Session(self.bucket, self.uri, unsigned=self._unsigned)
            self._known = (session, session.find(None))
        return self._known

    def _follow(self, answer: Answer, host: str, region: str | None) -> Again:
        """Goes on in the region that S3 names: once, and for all requests.

        Args:
            answer: S3's.
            host: Who gave it.
            region: The one that the request was signed for; None where it was not signed.
        """
        with self._lock:
            session, place = self._ready_locked()
            asked = region or place.region
            if self._followed and (host, asked) != (place.host, place.region):
                return Again(str(answer), at_once=True)  # it was sent before that was known
            if not answer.region or self._followed or answer.region == asked:
                raise _elsewhere(answer, asked)
            place.client.close()
            self._known = (session, session.find(answer.region))
            self._followed = True
        return Again(f"the bucket is in {answer.region}", at_once=True)


class _Signature:
    """How a request was signed: what it is told by, and what must never be shown of it."""

    def __init__(self, key: str | None, region: str | None, token: str | None, last: str) -> None:
        self.key = key
        self.region = region
        self.token = token
        self.secrets = [secret for secret in (key, token, last) if secret]

    @staticmethod
    def of(target: Target) -> _Signature:
        headers = {name.lower(): value for name, value in target.headers.items()}
        authorization = headers.get("authorization", "")
        match = _SIGNED.search(authorization)
        key, region = (match["key"], match["region"]) if match else (None, None)
        last = authorization.rpartition("Signature=")[2]
        return _Signature(key, region, headers.get("x-amz-security-token"), last)


def _elsewhere(answer: Answer, asked: str) -> SourceElsewhere:
    if answer.region and answer.region != asked:
        hint = f"Set AWS_REGION={answer.region}, and check AWS_ENDPOINT_URL if it is set."
    else:
        hint = "Check AWS_REGION and AWS_ENDPOINT_URL: they must be those of the bucket."
    return SourceElsewhere(
        "the bucket is elsewhere",
        where=answer.what,
        expected=f"region {asked}",
        got=f"{f'region {answer.region}, ' if answer.region else ''}{answer}",
        hint=hint,
    )
