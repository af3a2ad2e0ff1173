"""What the huggingface_hub package has left on this machine: its cache, its token, its switches.

The package itself is not needed. A cached branch is taken as it is: whether the hub's has moved on
is not asked, since that costs a round trip and fails where there is no network.
"""

from __future__ import annotations

import json
import os

from coldframe.loader.errors import SourceCredentials

__all__ = ["cache_directory", "find_cached", "find_token", "is_offline"]


def find_cached(repo: str, revision: str = "main") -> str | None:
    """The cached snapshot of a repository, if all that a checkpoint needs is in it.

    Args:
        repo: `org/name`, or a name alone.
        revision: A branch, a tag or a whole commit.

    Returns:
        Its directory, or None.
    """
    folder = os.path.join(cache_directory(), "--".join(["models", *repo.split("/")]))
    commit = _read_line(os.path.join(folder, "refs", revision)) or revision
    if "/" in commit or commit in (".", ".."):
        return None
    snapshot = os.path.join(folder, "snapshots", commit)
    return snapshot if _is_complete(snapshot) else None


def _is_complete(snapshot: str) -> bool:
    """Whether config and weights are there; a file is in a snapshot once all of it has come."""

    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(snapshot, name))

    if not has("config.json"):
        return False
    if has("model.safetensors"):
        return True
    try:
        with open(os.path.join(snapshot, "model.safetensors.index.json"), "rb") as file:
            shards = set(json.load(file)["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return bool(shards) and all(isinstance(shard, str) and has(shard) for shard in shards)


def cache_directory() -> str:
    """Where huggingface_hub keeps what it has downloaded."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if path := os.environ.get(name):
            return _expand(path)
    return os.path.join(_home(), "hub")


def _home() -> str:
    if path := os.environ.get("HF_HOME"):
        return _expand(path)
    return _expand(os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))


def _expand(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    return _is_true(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"))


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}


def find_token() -> tuple[str, str] | None:
    """The hub's token and where it was found, or None where there is none or it is not to be sent.

    Raises:
        SourceCredentials: There is a file for it that cannot be read.
    """
    if _is_true(os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name):
            token = value.strip()
            return (token, name) if token else None
    path = _expand(os.environ.get("HF_TOKEN_PATH") or os.path.join(_home(), "token"))
    try:
        token = _read_line(path)
    except (OSError, ValueError) as error:
        raise SourceCredentials(
            "the hub's token cannot be read",
            where=path,
            got=error.strerror if isinstance(error, OSError) else "no text",
            hint="Set HF_TOKEN, or HF_HUB_DISABLE_IMPLICIT_TOKEN=1 to go without a token.",
        ) from None
    return (token, path) if token else None


def _read_line(path: str) -> str:
    """A short file without the white space around it; empty where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(65536).strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
