"""`coldframe demo-model`: a checkpoint with real shapes, made here, without a network.

The files are those of a Hugging Face repository: config, generation config, sharded safetensors,
a byte-level BPE tokenizer with a chat template. The weights are random, so what such a model says
means nothing; but its greedy text is varied and depends on the whole prompt, so that a wrong
cache, position or stage shows as wrong text.

The directory appears whole or not at all: everything is written beside it and renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.checkpoints import demo_tokenizer
from coldframe.runtime.checkpoints.demo_weights import DTYPES, FAMILIES, SIZES, DemoModel, buffer
from coldframe.runtime.checkpoints.safetensors_writer import write_safetensors
from coldframe.runtime.flags.parser import Parser

__all__ = ["DemoModel", "add_arguments", "run", "write_demo_model"]

MARKER = "coldframe_demo.json"
"""Says what a directory was made from, so that a second call knows its own work."""

FORMAT = 1
"""Goes up whenever the same arguments would write other bytes."""

TOKENIZER_BYTES = 4 << 20
"""Room for everything but the weights; the largest tokenizer.json takes about 2.3 MB."""


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments."""
    default = DemoModel()
    parser.add_argument("dir", metavar="DIR", type=Path, help="where to write the checkpoint")
    parser.flag("--size", choices=list(SIZES), default=default.size)
    parser.flag("--family", choices=FAMILIES, default=default.family)
    parser.flag("--seed", type=int, default=default.seed, help="seed of the weights")
    parser.flag("--dtype", choices=list(DTYPES), default=default.dtype)
    parser.flag("--force", action="store_true", help="replace another demo model that is in DIR")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    model = DemoModel(args.size, args.family, args.seed, args.dtype)
    started = time.monotonic()
    written = write_demo_model(args.dir, model, force=args.force)
    what = (
        f"{model.family} {model.size}, {model.parameters() / 1e6:.1f} M parameters, "
        f"{model.nbytes() / 1e6:.1f} MB of {model.dtype} in {len(model.shards())} shards"
    )
    if written:
        print(f"{args.dir}: {what}, written in {time.monotonic() - started:.1f} s")
    else:
        print(f"{args.dir}: {what}, already there")
    return 0


def write_demo_model(directory: Path, model: DemoModel, *, force: bool = False) -> bool:
    """Write a demo model's checkpoint, unless it is there already.

    Peak memory is a few times the largest tensor.

    Args:
        directory: Where it goes; created, with its parents.
        model: Which one.
        force: Replace another demo model. Nothing else is ever replaced.

    Returns:
        True if it was written, False if it was there, complete and from the same arguments.

    Raises:
        RequestError: The directory holds something else.
        PlatformError: The disk is full, or the directory cannot be written.
    """
    target = Path(os.path.abspath(directory))
    if _is_complete(target, model):
        return False
    # The process id keeps two runs apart; one that is left over is from a process that was killed.
    fresh = target.parent / f".{target.name}.{os.getpid()}.new"
    try:
        _check_replaceable(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        _check_space(target.parent, model)
        fresh.mkdir()
        _write_files(fresh, model)
        _move_into_place(fresh, target)
    except OSError as error:
        if _is_complete(target, model):  # another process was faster
            return False
        raise _platform_error(error, target, model) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


def _write_files(directory: Path, model: DemoModel) -> None:
    size = model.shape
    add_bos = model.family in ("llama", "mistral")
    tokens = demo_tokenizer.train(directory / "tokenizer.json", size.vocab, add_bos=add_bos)
    _write_json(
        directory / "tokenizer_config.json",
        demo_tokenizer.tokenizer_config(size.context, add_bos=add_bos),
    )
    special = {
        "bos_token_id": 0 if add_bos else None,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    _write_json(directory / "config.json", model.config() | special)
    _write_json(directory / "generation_config.json", special | {"eos_token_id": [1, 3]})

    # Neither special tokens, which would end the text, nor single bytes, which are half characters.
    live = range(demo_tokenizer.FIRST_WORD, tokens)
    shards = model.shards()
    where: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where.update((entry.name, name) for entry in entries)
        values = (buffer(tensor) for _, tensor in model.weights(entries, live))
        write_safetensors(directory / name, entries, values, {"format": "pt"})
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": model.nbytes()}, "weight_map": where},
    )
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    _write_json(directory / MARKER, _arguments(model) | {"files": files})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _arguments(model: DemoModel) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(model)}


def _read_marker(directory: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((directory / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _is_complete(directory: Path, model: DemoModel) -> bool:
    marker = _read_marker(directory)
    if marker is None:
        return False
    files = marker.pop("files", None)
    if marker != _arguments(model) or not isinstance(files, dict):
        return False
    with contextlib.suppress(OSError):
        return all((directory / name).stat().st_size == size for name, size in files.items())
    return False


def _check_replaceable(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    marker = _read_marker(target)
    if marker is None:
        raise RequestError(
            "there is something else in place of the demo model",
            where=target,
            expected="nothing, an empty directory or a demo model",
            hint="Name another directory, or remove this one yourself.",
        )
    if not force:
        marker.pop("files", None)
        raise RequestError(
            "there is another demo model, or one with files missing",
            where=target,
            got=", ".join(f"{key} {value}" for key, value in marker.items()),
            hint="Name another directory, or replace it with --force.",
        )


def _check_space(parent: Path, model: DemoModel) -> None:
    free = shutil.disk_usage(parent).free
    if free < model.nbytes() + TOKENIZER_BYTES:
        raise _no_space(parent, model, free)


def _move_into_place(fresh: Path, target: Path) -> None:
    old = fresh.with_suffix(".old")
    if _read_marker(target) is not None:
        target.rename(old)
    try:
        fresh.rename(target)  # over an empty directory, too
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _platform_error(error: OSError, target: Path, model: DemoModel) -> PlatformError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(target.parent, model, shutil.disk_usage(target.parent).free)
    return PlatformError(
        "the demo model cannot be written",
        where=target,
        got=error.strerror or str(error),
        hint="Name a directory that this user may write to.",
    )


def _no_space(parent: Path, model: DemoModel, free: int) -> PlatformError:
    return PlatformError(
        "there is not enough disk space for the demo model",
        where=parent,
        expected=f"{model.nbytes() + TOKENIZER_BYTES} bytes",
        got=f"{free} bytes free",
        hint="Free some space, name a directory on another disk, or ask for a smaller --size.",
    )
