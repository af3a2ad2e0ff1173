"""Which models `coldframe serve` is to serve, and what they share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from coldframe.loader.errors import DeviceError, RequestError, SourceNotFound
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions, model_name

if TYPE_CHECKING:
    from coldframe.runtime.endpoint.room import Room
    from coldframe.runtime.gateway.platforms.profile import Profile

__all__ = ["memory_to_share", "named_models"]

_ALONE = {
    "source": "A place holds one model; name it as MODEL.",
    "serve_peers": "An address serves one model's peers.",
    "peers": "A peer has one model.",
    "peers_from": "Peers have one model.",
    "chat_template": "A template is one model's; put it into the checkpoint.",
}
"""Flags that say something of one model, and what to do instead."""
_MOST_KV = 4 << 30
_KV_PART = 0.25
"""Of the memory that several models share, what each one's KV takes at most."""


def named_models(
    args: argparse.Namespace, profile: Profile, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Where the models are, by the names that clients call them by, in the order given.

    Args:
        args: `models` are places, `model_name` their names, as far as they were given.
        profile: The platform may have a place and a name of its own.
        environ: Where COLDFRAME_MODEL may be.

    Raises:
        RequestError: There is none, a name stands for two, or a flag is for one alone.
        SourceNotFound: One of those that start later is not there.
    """
    own = profile.model(environ)
    places = (
        list(args.models)
        or _listed(getattr(args, "model_dir", None))
        or _split(environ.get("COLDFRAME_MODEL"))
        or _listed(own)
    )
    if not places:
        raise RequestError(
            "no model is named",
            where="MODEL",
            hint="Give a directory, s3://bucket/prefix or any other place as the first argument, "
            "or set COLDFRAME_MODEL.",
        )
    names = [name for given in args.model_name or () for name in _split(given)]
    if not names and len(places) == 1:
        names = _listed(profile.model_name(environ))
    if names and len(names) != len(places):
        raise RequestError(
            "there is not a name for each model",
            where="--model-name",
            expected=f"{len(places)}, in the order of the models",
            got=len(names),
        )
    names = names or [model_name(place) for place in places]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(
                "two models have the same name",
                where="--model-name",
                got=name,
                hint="Give each a name of its own, in their order.",
            )
    for flag, hint in _ALONE.items():
        if len(places) > 1 and getattr(args, flag):
            raise RequestError(
                "this is for one model, and there are several",
                where=f"--{flag.replace('_', '-')}",
                hint=hint,
            )
    for place in places[1:]:  # the first one is looked at by its start
        location = parse_location(place)
        if isinstance(location, Directory) and not os.path.isdir(location.path):
            raise SourceNotFound(
                "there is no such directory",
                where=place,
                hint="Check the path, or whether the volume is mounted.",
            )
    return dict(zip(names, places, strict=True))


def memory_to_share(
    options: ReplicaOptions, models: int, wanted: int | None, available: Callable[[], int]
) -> tuple[Room | None, ReplicaOptions]:
    """The device's memory that models have together, and what each is to be within it.

    Args:
        options: As they are asked for.
        models: How many there are.
        wanted: Bytes, where somebody has said so; one model alone needs no such bound.
        available: Tells what there is of the host's.

    Returns:
        The memory that they share, or None, and the options. KV takes a quarter of it at most,
        unless its size was given. How much a GPU has the first one to be up on it will find out.

    Raises:
        DeviceError: There is not so much.
    """
    if models == 1 and wanted is None:
        return None, options
    from coldframe.runtime.endpoint.room import (
        Room,  # only those who share need it, and the bytes wait
    )

    if options.device != CPU:
        if options.kv_bytes is None:
            kv_bytes = None if wanted is None else int(_KV_PART * wanted)
            options = replace(options, kv_bytes=kv_bytes, kv_part=_KV_PART)
        return Room(wanted), options
    left = available()
    total = left if wanted is None else wanted
    if total > left:
        raise DeviceError(
            "the models are to share more memory than there is",
            where="--device-memory",
            expected=f"at most {left:,} bytes",
            got=f"{total:,}",
            hint="Ask for less; all that is available is the default.",
        )
    if options.kv_bytes is None:
        options = replace(options, kv_bytes=min(_MOST_KV, int(_KV_PART * total)))
    return Room(total), options


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _listed(text: str | None) -> list[str]:
    return [text] if text else []
