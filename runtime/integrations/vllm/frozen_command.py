"""`coldframe snapshot create MODEL --engine vllm`, and what `verify` does with such an image."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import ColdframeError, RequestError, SnapshotError
from coldframe.loader.location import Directory, parse_location
from coldframe.loader.strict_json import parse_object
from coldframe.runtime.creating import prune
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.units import human_bytes, human_seconds
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey

__all__ = ["create", "verify"]


def create(args: argparse.Namespace, snapshot: SnapshotOptions) -> int:
    """Makes an image of a vLLM engine.

    Raises:
        ColdframeError: It cannot be made; nothing is kept.
    """
    started = time.monotonic()
    engine = replace(_engine(args), arguments=_arguments(args.engine_args))
    image = engine.create(snapshot, compress=args.compress, name=args.model)
    removed = prune(snapshot, image.id)
    assert image.oracle is not None
    document = {
        "image": image.id,
        "model": args.model,
        "engine": "vllm",
        "store": snapshot.store,
        "bytes": image.image_bytes,
        "oracle": image.oracle.to_json(),
        "removed": removed,
        "seconds": time.monotonic() - started,
    }
    if args.json:
        print(json.dumps(document))
    else:
        print(
            f"image {image.id} of {args.model} in vLLM: {human_bytes(image.image_bytes)}, "
            f"{human_seconds(document['seconds'])}, in {snapshot.store}"
        )
    return 0


def verify(
    args: argparse.Namespace, snapshot: SnapshotOptions, image: Manifest
) -> ColdframeError | None:
    """Why an image of a vLLM engine is not to be used; None where its clone answers as it must."""
    assert image.engine is not None
    engine = _engine(args)
    try:
        engine = replace(engine, arguments=json.loads(image.engine.arguments))
        refusal = (
            image.model.refusal(ModelKey.of(engine.model))
            or image.machine.refusal(Machine.here())
            or image.engine.refusal(engine.key)
        )
        if refusal is not None:
            return SnapshotError(
                "the image does not fit",
                where=refusal.field,
                expected=refusal.expected,
                got=refusal.got,
                hint="It may fit another machine, or another installation of vLLM.",
            )
        engine.verify(snapshot, image)
    except ColdframeError as error:
        return error
    return None


def _engine(args: argparse.Namespace) -> EngineImage:
    location = parse_location(args.model)
    if not isinstance(location, Directory):
        raise RequestError(
            "an engine of vLLM's is frozen from a local model",
            where=args.model,
            expected="a directory",
            hint="Its weights are not in the image, but vLLM reads its config and its tokenizer.",
        )
    return EngineImage(location.path, {}, args.threads or cpu_count())


def _arguments(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    return parse_object(
        text.encode(), where="--engine-args", hint="Such as '{\"max_model_len\": 4096}'."
    )
