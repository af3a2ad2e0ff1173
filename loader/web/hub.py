"""A repository on the Hugging Face hub: how its files are asked for, and what refusals mean.

The first answer fixes the commit that is read, so that a push meanwhile cannot mix two versions.
What is in the local cache is not asked for here: see `hub_cache`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn
from urllib.parse import quote

from coldframe.loader.errors import (
    RequestError,
    SourceChanged,
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.sources.location import Hub
from coldframe.loader.web.address import Again, Refusal, Target
from coldframe.loader.web.http import (
    bearer,
    later,
    other_error,
    refusal_error,
    request_headers,
    status_of,
)
from coldframe.loader.web.hub_cache import cache_directory, find_cached, find_token, is_offline
from coldframe.loader.web.redirects import Redirects
from coldframe.loader.web.url import Url

__all__ = ["HubAddress", "find_cached"]

_ENDPOINT = "https://huggingface.co"
_NO_FILE = "EntryNotFound"
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


class HubAddress:
    """The files of one revision of a repository on the hub. Safe for several threads.

    The reader tells it of every answer (`accepted`, `refused`): the first that names a commit
    makes that the revision of all further requests.

    Args:
        location: Repository and revision.

    Raises:
        SourceNotFound: The hub must not be asked: see `is_offline`.
        SourceCredentials: There is a token, but none that could be sent.
        RequestError: `HF_ENDPOINT` is no URL.
    """

    def __init__(self, location: Hub) -> None:
        if is_offline():
            raise SourceNotFound(
                "it is not, or not wholly, in the local cache, and offline mode is on",
                where=location.uri,
                expected=f"config and weights in {cache_directory()}",
                hint="Download it first, or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE.",
            )
        self._location = location
        self._endpoint = _endpoint()
        token = find_token()
        self._token_source = None if token is None else token[1]
        self._authorization = self._endpoint.basic if token is None else bearer(*token)
        self._commit: str | None = None
        self._lock = threading.Lock()
        self._redirects = Redirects(self._first)

    @property
    def uri(self) -> str:
        return self._location.uri

    def uri_of(self, name: str) -> str:
        return f"{self._location.uri}/{name}"

    @property
    def commit(self) -> str | None:
        """The commit that is read, once the hub has named it."""
        return self._commit

    def _first(self, name: str) -> Url:
        revision = quote(self._commit or self._location.revision, safe="")
        root = self._endpoint.path.rstrip("/")
        path = f"{root}/{self._location.repo}/resolve/{revision}"
        return replace(self._endpoint, path=path).child(name)

    def target(self, name: str, headers: Mapping[str, str]) -> Target:
        return self._redirects.target(
            name, lambda url: request_headers(headers, url, self._endpoint, self._authorization)
        )

    def accepted(self, target: Target, headers: Mapping[str, str]) -> None:
        """Sees an answer that is what was asked for, before its body is read.

        Args:
            target: The request.
            headers: The answer's, with names in lower case.

        Raises:
            SourceChanged: It is of another commit than the answers before it.
        """
        commit = headers.get("x-repo-commit", "")
        if not self._is_hub(target) or not _COMMIT.fullmatch(commit):
            return
        with self._lock:
            if self._commit is None:
                self._commit = commit
        if self._commit != commit:
            raise SourceChanged(
                "the repository was pushed to while it was read",
                where=self.uri,
                expected=f"commit {self._commit}",
                got=f"commit {commit}",
                hint="Start again.",
            )

    def refused(self, refusal: Refusal) -> Again:
        self.accepted(refusal.target, refusal.headers)  # a redirect and "no such file" name it too
        again = self._redirects.again(refusal) or later(refusal)
        if again is not None:
            return again
        if self._is_hub(refusal.target):
            self._refuse(refusal)
        raise other_error(refusal)

    def _is_hub(self, target: Target) -> bool:
        return (target.scheme, target.host, target.port) == self._endpoint.origin

    def _refuse(self, refusal: Refusal) -> NoReturn:
        """Raises what the hub means; the status alone does not tell."""
        status = refusal.status
        if status in (404, 410) and refusal.headers.get("x-error-code", _NO_FILE) == _NO_FILE:
            hint = "Check that the repository holds safetensors weights."
            raise refusal_error(SourceNotFound, "the hub has no such file", refusal, hint)
        kind, what, hint = self._meaning(
            status,
            refusal.headers.get("x-error-code", ""),
            refusal.headers.get("x-error-message", ""),
        )
        if kind is None:
            raise other_error(refusal)
        where = f"{self.uri} at {self._endpoint.uri}"
        raise kind(what, where=where, got=status_of(refusal), hint=hint)

    def _meaning(
        self, status: int, code: str, message: str
    ) -> tuple[type[SourceError] | None, str, str]:
        """Of a refusal of the whole repository: the kind of error, its text and the remedy."""
        refused = SourceCredentials if status == 401 else SourceDenied
        repo = self._location.repo
        if code == "GatedRepo":
            page = f"{self._endpoint.uri}/{repo}"
            hint = f"Accept its licence at {page}, and set HF_TOKEN to a token of that account."
            return refused, "the repository is gated, and this account is not let in", hint
        if code == "RevisionNotFound":
            hint = "Name a branch, a tag or a commit that is in it."
            return SourceNotFound, "there is no such revision", hint
        if message == "Invalid credentials in Authorization header":
            hint = f"Set a token that is valid now in {self._token_source or 'HF_TOKEN'}."
            return SourceCredentials, "the hub does not take the token", hint
        if code == "RepoNotFound" or status == 401:
            # The hub does not tell a stranger which private repositories there are.
            hint = "For a private one set HF_TOKEN to a token that may read it."
            if self._token_source is not None:
                hint = f"The token of {self._token_source} cannot read it."
            return (
                SourceCredentials if status == 401 else SourceNotFound,
                "there is no such repository, or it is private",
                f"Check the name. {hint} A directory is written ./{repo}.",
            )
        if message == "Access to this resource is disabled.":
            return SourceDenied, "the hub has disabled the repository", "Ask its owner."
        if status == 403:
            hint = "The token needs the right to read this repository's contents."
            return SourceDenied, "the hub denies access", hint
        return None, "", ""


def _endpoint() -> Url:
    try:
        return replace(Url.parse(os.environ.get("HF_ENDPOINT") or _ENDPOINT), query="")
    except ValueError as error:
        raise RequestError(
            f"the hub's endpoint cannot be asked: {error}",
            where="HF_ENDPOINT",
            expected=f"a URL such as {_ENDPOINT}",
            hint="Set it anew, or unset it.",
        ) from None
