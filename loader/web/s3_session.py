"""What botocore knows of S3: credentials, region, endpoint and style of addressing.

boto3 stands on botocore and adds nothing to these, but a tenth of a second to the start: so this
goes to botocore itself. All that its configuration knows works here too, and `AWS_REGION`; only its
documented interfaces are used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from coldframe.loader.errors import PlatformError, SourceCredentials, SourceError
from coldframe.loader.packages import add_site_packages
from coldframe.loader.web.s3_refusals import clean

__all__ = ["UNSIGNED_VARIABLE", "Place", "S3Session"]

UNSIGNED_VARIABLE = "COLDFRAME_S3_UNSIGNED"
"""Set to 1, requests are sent without a signature: for public buckets."""

_PROBE = "coldframe"
_RENEW_PAUSE_S = 60.0
_TIMEOUT_S = 10.0
_BUCKET_HINT = "Check the bucket's name, AWS_REGION and AWS_ENDPOINT_URL."


@dataclass(frozen=True, slots=True)
class Place:
    """Where a bucket is asked.

    Attributes:
        client: botocore's, safe for several threads.
        root: Scheme, host and port, as the head of a URL.
        scheme: `http` or `https`.
        host: Name or address, without brackets.
        port: TCP port.
        base: What comes before the key in the request's path; ends with a slash.
        region: The one to sign for.
    """

    client: Any = field(repr=False)
    root: str
    scheme: str
    host: str
    port: int
    base: str
    region: str


class S3Session:
    """botocore's session for one bucket. Not safe for several threads, but for `frozen`.

    Args:
        bucket: Its name, or an access point's alias.
        uri: The place, for errors.
        unsigned: Requests are not signed, and no credentials are looked for.

    Raises:
        PlatformError: boto3 is not installed.
    """

    def __init__(self, bucket: str, uri: str, *, unsigned: bool) -> None:
        self._bucket = bucket
        self._uri = uri
        self._unsigned = unsigned
        self._session = _new_session()
        self._credentials: Any = None
        self._renewed_at: float | None = None

    @property
    def ca_bundle(self) -> str | None:
        """The file of certificates to trust that the configuration names, if any."""
        found = self._session.get_config_variable("ca_bundle")
        return None if found is None else str(found)

    def find(self, region: str | None) -> Place:
        """Lets botocore say where the bucket is asked; sends no request.

        Args:
            region: Where it is; None takes the configuration's region, and AWS's first without.

        Raises:
            SourceCredentials: There are no credentials, or they cannot be had.
            SourceError: The bucket cannot be addressed.
        """
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        if self._bucket.endswith("--x-s3"):
            raise SourceError(
                "buckets of this kind cannot be read",
                where=self._uri,
                expected="a general purpose bucket",
                got="a directory bucket (S3 Express)",
                hint="Copy the model to a general purpose bucket.",
            )
        from botocore.config import Config  # type: ignore[import-untyped]

        # The client itself sends but a few small requests, whose answers nobody waits for long.
        config = Config(connect_timeout=_TIMEOUT_S, read_timeout=_TIMEOUT_S)
        if self._unsigned:
            from botocore import UNSIGNED  # type: ignore[import-untyped]

            config = config.merge(Config(signature_version=UNSIGNED))
        elif self._credentials is None:
            self._credentials = self._credentials_of(self._session)
        try:
            client = self._session.create_client("s3", region_name=region, config=config)
            url, signing_region = _addressed(client, self._bucket)
        except (BotoCoreError, ValueError) as error:
            raise SourceError(
                "the bucket cannot be addressed",
                where=self._uri,
                got=clean(str(error)),
                hint=_BUCKET_HINT,
            ) from None
        parts = urlsplit(url)
        return Place(
            client,
            f"{parts.scheme}://{parts.netloc}",
            parts.scheme,
            parts.hostname or "",
            parts.port or (443 if parts.scheme == "https" else 80),
            parts.path.removesuffix(_PROBE),
            signing_region,
        )

    def frozen(self) -> Any:
        """The credentials of this moment; temporary ones are refreshed before they expire.

        Raises:
            SourceCredentials: They have expired and cannot be refreshed.
        """
        return self._told(self._credentials.get_frozen_credentials)

    def renewed(self, key: str | None, token: str | None) -> bool:
        """Whether there are other credentials now than those that were refused.

        Args:
            key: The access key that was refused.
            token: The session token that went with it, or None.

        Raises:
            SourceCredentials: There are none any more, or they cannot be had.
        """
        if self._unsigned:
            return False
        now = self.frozen()
        if (now.access_key, now.token) != (key, token):
            return True
        tried = self._renewed_at
        if tried is not None and time.monotonic() - tried < _RENEW_PAUSE_S:
            return False
        self._renewed_at = time.monotonic()
        # A session of its own looks everywhere anew: in files that were written meanwhile, and at
        # the role. The old one keeps what has not expired by the clock here.
        fresh = self._credentials_of(_new_session())
        new = self._told(fresh.get_frozen_credentials)
        if (new.access_key, new.token) == (key, token):
            return False
        self._credentials = fresh
        return True

    def _credentials_of(self, session: Any) -> Any:
        credentials = self._told(session.get_credentials)
        if credentials is None:
            profile = session.get_config_variable("profile") or "default"
            raise SourceCredentials(
                "there are no AWS credentials",
                where=self._uri,
                expected="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
                got=(
                    f"none in the environment, in the profile {profile!r} of ~/.aws/credentials "
                    "and ~/.aws/config, or from a container's or an instance's role"
                ),
                hint=f"Configure one of them; for a public bucket set {UNSIGNED_VARIABLE}=1.",
            )
        return credentials

    def _told(self, get: Callable[[], Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return get()
        # RuntimeError: botocore's word for refreshed credentials that have expired all the same.
        except (BotoCoreError, ClientError, RuntimeError) as error:
            raise SourceCredentials(
                "the AWS credentials cannot be had",
                where=self._uri,
                got=clean(str(error)),
                hint="Check the profile or role that the environment names, or log in again.",
            ) from None


class _Addressed(Exception):
    """Carries the address out of botocore, just before a request would be signed and sent."""

    def __init__(self, url: str, region: str) -> None:
        super().__init__(url)
        self.found = (url, region)


def _addressed(client: Any, bucket: str) -> tuple[str, str]:
    """The URL of the key `_PROBE`, and the region to sign for.

    `before-sign` is a documented event. A presigned URL would tell an address as well, but not the
    one that requests go to: it prefers the global endpoint.
    """

    def stop(request: Any, region_name: str, **_: object) -> None:
        raise _Addressed(request.url, region_name)

    events = client.meta.events
    events.register_last("before-sign.s3.HeadObject", stop)
    try:
        client.head_object(Bucket=bucket, Key=_PROBE)
    except _Addressed as addressed:
        return addressed.found
    finally:
        events.unregister("before-sign.s3.HeadObject", stop)
    raise ValueError("botocore did not say where the bucket is")


def _new_session() -> Any:
    add_site_packages()
    try:
        import botocore.session  # type: ignore[import-untyped]
    except ImportError:
        raise PlatformError(
            "s3:// needs boto3", expected="boto3", hint="Run: pip install 'coldframe[s3]'"
        ) from None
    session = botocore.session.get_session()
    # Lambda, ECS and EKS set AWS_REGION, and AWS's other SDKs read it; this one alone does not.
    if region := os.environ.get("AWS_REGION"):
        session.set_config_variable("region", region)
    return session
