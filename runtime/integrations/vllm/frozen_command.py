"""`coldframe snapshot create MODEL --engine vllm`, and what `verify` does with such an image."""

from __future__ import annotations

import argparse
import json
import time

from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.flags.vllm import engine_settings, interpreter
from coldframe.runtime.frozen.creating import prune
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.integrations.vllm.frozen_key import told
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.runtime.units import human_bytes, human_seconds
from coldframe.snapshot.manifest import Manifest

__all__ = ["create", "verify"]


def create(args: argparse.Namespace, snapshot: SnapshotOptions) -> int:
    """Makes an image of a vLLM engine, as `--decode vllm` with the same flags has one.

    Raises:
        ColdframeError: It cannot be made; nothing is kept.
    """
    started = time.monotonic()
    vllm = VllmOptions(
        interpreter(args.vllm_python, where="--engine vllm"),
        kv_bytes=args.vllm_kv,
        args=engine_settings(args.vllm_args or ()),
    )
    engine = EngineImage(_directory(args.model), vllm, args.threads)
    image = engine.create(snapshot, compress=args.compress, name=args.model)
    removed = prune(snapshot, image.id)
    assert image.oracle is not None
    assert image.engine is not None
    document = {
        "image": image.id,
        "model": args.model,
        "engine": image.engine.name,
        **json.loads(image.engine.sizes),
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
        print(f"sizes: {image.engine.sizes}")
    return 0


def verify(
    args: argparse.Namespace, snapshot: SnapshotOptions, image: Manifest
) -> ColdframeError | None:
    """Why an image of a vLLM engine is not to be used; None where its clone answers as it must."""
    assert image.engine is not None
    try:
        python = interpreter(args.vllm_python, where=f"image {image.id} is of vLLM's engine")
        vllm = VllmOptions(python, args=tuple(told(image.engine.arguments).items()))
        EngineImage(_directory(args.model), vllm, args.threads).verify(snapshot, image)
    except ColdframeError as error:
        return error
    return None


def _directory(model: str) -> str:
    location = parse_location(model)
    if not isinstance(location, Directory):
        raise RequestError(
            "an engine of vLLM's is frozen from a local model",
            where=model,
            expected="a directory",
            hint="Its weights are not in the image, but vLLM reads its config and its tokenizer.",
        )
    return location.path
