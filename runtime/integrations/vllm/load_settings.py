"""What a user asks of the loader: the keys of `model_loader_extra_config`, and what they mean.

A connector's `kv_connector_extra_config` has the first two of them besides keys of its own, so
that only the loader refuses what it does not know.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coldframe.loader.checkpoints.plan import Layout
from coldframe.loader.checkpoints.slices import WHOLE, Rank
from coldframe.loader.errors import RequestError
from coldframe.loader.loads.options import LoadOptions
from coldframe.runtime.units import byte_count, byte_rate

__all__ = ["ALIAS", "KEYS", "LoadSettings"]

ALIAS = ("auto", "on", "off")
_CACHE_BYTES = 100 << 30
_WHERE = "model_loader_extra_config"


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Where weights come from, and what becomes of them.

    Attributes:
        memory_service: The socket of a memory service that runs already, or None.
        source: The place to load from, as `sources.location.parse_location` takes it; None is the
            model that vLLM was given.
        options: Further fields of `LoadOptions`.
        alias: `on` where vLLM's parameters are to be the arena itself, `off` where they are to be
            copies, `auto` where whatever measures best is to be done.
        gated: Whether the engine starts before the weights are in: true, false, or `auto` for
            where that is safe.
    """

    memory_service: str | None
    source: str | None
    options: dict[str, Any]
    alias: str = "auto"
    gated: str | bool = "auto"

    @staticmethod
    def parse(extra: Mapping[str, object], *, others: bool = False) -> LoadSettings:
        """What a mapping asks for.

        Args:
            extra: As the user wrote it.
            others: Whether it may have further keys.

        Raises:
            RequestError: It has a key that is none, or a value that cannot be; or it names both a
                memory service and what that has loaded already.
        """
        values = {}
        for key, value in extra.items():
            if key not in KEYS:
                if others:
                    continue
                raise _unknown(key)
            if value is not None:
                values[key] = KEYS[key](key, value)
        service, source = values.pop("memory_service", None), values.pop("source", None)
        alias = values.pop("alias", "auto")
        gated = values.pop("gated", "auto")
        if service is not None and (source is not None or values):
            key = "source" if source is not None else next(iter(values))
            raise RequestError(
                "a memory service has been told what to load by its owner",
                where=f"{_WHERE}: memory_service, {key}",
                expected="one of the two",
                got="both",
                hint="Leave out either; with `source` the loader starts a service of its own.",
            )
        return LoadSettings(service, source, values, alias, gated)

    def load_options(self, model: str, rank: Rank = WHOLE, device: str = "cpu") -> LoadOptions:
        """What a memory service of this process' own is to load.

        Args:
            model: Where `source` says nothing.
            rank: Whose slices.
            device: Where the weights go, where nothing else was said.
        """
        # As in their files q, k and v are apart, and what vLLM has of them as one is a copy.
        aligned = rank != WHOLE or self.alias == "on"
        layout = self.options.get("layout", Layout.ALIGNED if aligned else None)
        return LoadOptions(
            model=self.source or model,
            **{"device": device, "cache_bytes": _CACHE_BYTES, **self.options, "layout": layout},
            rank=rank.index,
            ranks=rank.ranks,
        )


def _unknown(key: str) -> RequestError:
    close = difflib.get_close_matches(key, KEYS, n=1)
    return RequestError(
        "there is no such setting of the loader",
        where=_WHERE,
        expected=", ".join(KEYS),
        got=repr(key),
        hint=f"Did you mean {close[0]!r}?" if close else "Leave it out, or write one of these.",
    )


def _refused(key: str, expected: str, value: object) -> RequestError:
    return RequestError(
        "a setting of the loader cannot be that",
        where=f"{_WHERE}: {key}",
        expected=expected,
        got=repr(value),
        hint="Correct it.",
    )


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _refused(key, "a text that is not empty", value)
    return value


def _texts(key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise _refused(key, "a list of texts", value)
    return tuple(value)


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refused(key, "true or false", value)
    return value


def _count(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refused(key, "a whole number above zero", value)
    return value


def _one_of(*words: str) -> Callable[[str, object], str]:
    def parse(key: str, value: object) -> str:
        if value not in words:
            raise _refused(key, " or ".join(words), value)
        return str(value)

    return parse


def _quantity(of_text: Callable[[str], float], example: str) -> Callable[[str, object], float]:
    def parse(key: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return value
        if isinstance(value, str):
            try:
                return of_text(value)
            except argparse.ArgumentTypeError:
                pass
        raise _refused(key, f"a number above zero, or a text such as {example}", value)

    return parse


def _auto_or_flag(key: str, value: object) -> str | bool:
    if value == "auto":
        return "auto"
    if not isinstance(value, bool):
        raise _refused(key, "auto, true or false", value)
    return value


KEYS: dict[str, Callable[[str, object], Any]] = {
    "memory_service": _text,
    "source": _text,
    "sources": _texts,
    "alias": _one_of(*ALIAS),
    "gated": _auto_or_flag,
    "layout": _one_of(*Layout),
    "copy": _flag,
    "verify": _flag,
    "throttle": _quantity(byte_rate, "200MB/s"),
    "threads": _count,
    "cache": _text,
    "cache_bytes": _quantity(byte_count, "100GB"),
    "peers": _texts,
    "peers_from": _texts,
    "peer_readers": _count,
    "serve_peers": _text,
    "peer_token": _text,
    "device": _text,
}
"""All settings, and what reads each."""
