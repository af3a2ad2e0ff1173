"""Whether the secrets that are needed can be reached; of what kind they are, and nothing of them.

No value, nor a part of one, is in what comes back.
"""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import Any

from coldframe.loader.checkpoints.checkpoint import CONFIG_NAME
from coldframe.loader.errors import ColdframeError, PlatformError, SourceCredentials
from coldframe.loader.sources.location import S3, Hub, Peer, parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.runtime.gateway.keys import KEYS_FILE_VARIABLE, KEYS_VARIABLE, load_keys
from coldframe.snapshot.store import open_store

__all__ = ["api_keys", "hub", "peer", "s3"]

_CHAIN_S = 3.0


def s3(case: Case) -> Finding:
    """What boto3's chain finds, and whether the named bucket answers to it."""
    wanted = _is(case, S3) or case.store.startswith("s3://")
    method = _s3_method(must=wanted)
    facts: dict[str, Any] = {"kind": method, "wanted": wanted, "bucket": None}
    if method is None and not wanted:
        return Finding("s3_credentials", "none, and nothing needs them", facts)
    if method is None:
        error = SourceCredentials(
            "there are no credentials for S3",
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role.",
        )
        return Finding("s3_credentials", "", facts, error, needed=True)
    says = f"found ({method})"
    if wanted:
        try:
            facts["bucket"] = _bucket_answers(case)
        except ColdframeError as error:
            return Finding("s3_credentials", says, facts, error, needed=True)
        says += f"; {facts['bucket']} answers"
    return Finding("s3_credentials", says, facts)


def _s3_method(*, must: bool) -> str | None:
    """The kind of credentials that are found: `env`, `shared-credentials-file`, a role."""
    try:
        from botocore.session import Session  # type: ignore[import-untyped]
    except ImportError:
        if must:
            raise PlatformError(
                "botocore is not installed", hint="Run: pip install 'coldframe[s3]'"
            ) from None
        return None
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    found: list[str | None] = []

    def look() -> None:
        session = Session()
        # A machine without a metadata service must not be asked for long.
        session.set_config_variable("metadata_service_timeout", 1)
        session.set_config_variable("metadata_service_num_attempts", 1)
        try:
            credentials = session.get_credentials()
        except BotoCoreError:  # a profile that is not there, for one
            credentials = None
        found.append(None if credentials is None else str(credentials.method))

    thread = threading.Thread(target=look, name="credentials", daemon=True)
    thread.start()
    thread.join(_CHAIN_S)
    return found[0] if found else None


def _bucket_answers(case: Case) -> str:
    """Asks for something small of the bucket that is named: its name.

    Raises:
        ColdframeError: It does not answer, or not to these credentials.
    """
    if case.model is not None and _is(case, S3):
        place = parse_location(case.model)
        with closing(open_origin(place, hurry=True)) as origin:
            origin.read_small(CONFIG_NAME, 1 << 20)
        return str(place.uri)
    open_store(case.store).check_writable()
    return case.store


def hub(case: Case) -> Finding:
    from coldframe.loader.web.hub_cache import find_token

    token = find_token()
    wanted = _is(case, Hub)
    facts = {"from": None if token is None else token[1], "wanted": wanted}
    if token is not None:
        return Finding("hub_token", f"found ({token[1]})", facts)
    says = "none; public models need none" if wanted else "none, and nothing needs one"
    return Finding("hub_token", says, facts)


def peer(case: Case) -> Finding:
    there = bool(os.environ.get("COLDFRAME_PEER_TOKEN"))
    wanted = _is(case, Peer)
    facts = {"there": there, "wanted": wanted}
    if wanted and not there:
        error = SourceCredentials(
            "there is no token for peers",
            where="COLDFRAME_PEER_TOKEN",
            hint="Set it to the one that the peer was started with.",
        )
        return Finding("peer_token", "", facts, error, needed=True)
    return Finding("peer_token", "found" if there else "none, and nothing needs one", facts)


def api_keys(case: Case) -> Finding:
    """Whether an endpoint would be closed to strangers, and its file of keys can be read."""
    by = [name for name in (KEYS_VARIABLE, KEYS_FILE_VARIABLE) if os.environ.get(name)]
    loaded = load_keys(loopback=True)
    facts = {"from": by, "count": len(loaded.keys)}
    if not loaded.keys:
        says = "none: an endpoint would be open to whoever reaches it"
        remedy = f"Set {KEYS_VARIABLE} or {KEYS_FILE_VARIABLE}, unless a proxy asks for keys."
        return Finding("api_keys", says, facts, remedy=remedy)
    says = f"{len(loaded.keys)} (by {', '.join(by)})"
    return Finding("api_keys", says, facts, remedy=" ".join(loaded.warnings) or None)


def _is(case: Case, kind: type) -> bool:
    return case.model is not None and isinstance(parse_location(case.model), kind)
