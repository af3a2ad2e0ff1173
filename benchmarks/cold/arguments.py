"""The command line of `coldframe bench cold`: its flags, and what of them makes no sense."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from coldframe.benchmarks.cold.baseline import share
from coldframe.benchmarks.cold.contender import CONTENDERS
from coldframe.benchmarks.cold.matrix import (
    AXES,
    DEFAULT,
    QUICK,
    Block,
    blocks_of,
    read_matrix,
)
from coldframe.benchmarks.harness import fingerprint, words
from coldframe.benchmarks.output import add_output_arguments, check_output
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.machine.free_memory import add_rest
from coldframe.runtime.units import byte_count

__all__ = ["about", "add_arguments", "blocks"]

_AXES = (*AXES, "throttle")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    matrix = parser.add_argument_group("what is measured (a default matrix; see docs)")
    # Without twins in the environment: there the same names are settings of a replica.
    for axis, values in AXES.items():
        matrix.add_argument(f"--{axis}", help=f"some of {','.join(values)}")
    matrix.add_argument("--throttle", metavar="RATES", help="as none,200MB/s (none)")
    parser.flag("--matrix", metavar="FILE", type=Path, group=matrix, help="blocks, JSON or TOML")
    parser.flag("--quick", action="store_true", group=matrix, help="a small matrix, 3 runs")
    parser.add_argument(
        "--beside",
        metavar="NAMES",
        default="",
        help="other programs to start beside it: "
        + "; ".join(f"{name}: {what}" for name, what in CONTENDERS.items()),
    )
    parser.flag("--runs", type=int, help="of each cell (7)")
    add_rest(parser)
    parser.flag("--prompt-tokens", type=int, default=64, help="of the prompt (64)")
    parser.flag("--tokens", type=int, default=8, help="of each answer (8)")
    parser.flag(
        "--no-plan",
        action="store_true",
        help="do not ask `coldframe plan` for what stands beside the measurement",
    )
    parser.flag("--vllm-python", metavar="PATH", help="an interpreter that has vLLM")
    parser.flag("--vllm-kv", type=byte_count, default=256 << 20, help="for vLLM's KV (256MiB)")
    parser.add_argument(
        "--snapshot-store",
        metavar="DIR",
        type=Path,
        help="an empty directory for images, on the disk to measure (a temporary one)",
    )
    against = parser.add_argument_group("against an earlier document")
    against.add_argument("--baseline", metavar="FILE", type=Path, help="the earlier document")
    against.add_argument(
        "--fail-if-slower",
        metavar="SHARE",
        type=_share,
        help="status 1 where a cell's median is slower by more than that, as 10%%, and its "
        "fastest run is slower than the earlier median (10%%)",
    )
    against.add_argument(
        "--any-baseline",
        action="store_true",
        help="also one of another machine, model or versions",
    )
    parser.flag(
        "--any-tokens", action="store_true", help="status 0 also where cells give other tokens"
    )
    add_output_arguments(parser)


def _share(text: str) -> float:
    try:
        return share(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def blocks(args: argparse.Namespace) -> Sequence[Block]:
    """The matrix that is asked for; of the runs it decides how many where they are not named.

    Raises:
        RequestError: There is no such matrix, or there are two.
    """
    chosen = {axis: getattr(args, axis) for axis in _AXES}
    named = [f"--{axis}" for axis, value in chosen.items() if value is not None]
    ways = [*(["--matrix"] if args.matrix else []), *(["--quick"] if args.quick else [])]
    if len(ways) + bool(named) > 1:
        raise RequestError(
            "there is one matrix",
            where=", ".join([*ways, *named]),
            expected="--matrix, --quick, or values of its axes",
        )
    if args.runs is None:
        args.runs = 3 if args.quick else 7
    if args.matrix is not None:
        return read_matrix(args.matrix)
    if args.quick:
        return QUICK
    return blocks_of(chosen) if named else DEFAULT


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the document says of model, machine and request, before anything is measured.

    Raises:
        RequestError: An argument makes no sense.
        CheckpointError: The model is not sound.
    """
    if not args.model.is_dir():
        raise RequestError(
            "there is no such directory",
            where="MODEL",
            got=args.model,
            hint="Give a local checkpoint's directory; --source serves it in other ways.",
        )
    for name in ("runs", "tokens", "prompt_tokens"):
        if getattr(args, name) < 1:
            where = f"--{name.replace('_', '-')}"
            raise RequestError("there must be one", where=where, got=getattr(args, name))
    if args.fail_if_slower is not None and args.baseline is None:
        raise RequestError(
            "there is nothing to be slower than",
            where="--fail-if-slower",
            hint="Name an earlier document with --baseline.",
        )
    store = args.snapshot_store
    if store is not None and store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise RequestError(
            "the directory for the images is not empty",
            where="--snapshot-store",
            got=store,
            hint="Name one that is empty or not there: its files are evicted and read.",
        )
    check_output(args.output)
    beside = words(args.beside, CONTENDERS)
    model = _model(args.model)
    if args.prompt_tokens + args.tokens > model["context_length"]:
        raise RequestError(
            "the request is longer than the model's context",
            where="--prompt-tokens, --tokens",
            expected=f"at most {model['context_length']} together",
            got=args.prompt_tokens + args.tokens,
        )
    return {
        "model": model,
        "fingerprint": fingerprint(
            device=args.device,
            model=args.model,
            vllm_python=args.vllm_python,
            transformers=bool({"transformers", "fastapi"} & set(beside)),
        ),
        "prompt_tokens": args.prompt_tokens,
        "answer_tokens": args.tokens,
    }


def _model(path: Path) -> dict[str, Any]:
    from coldframe.loader.checkpoints.checkpoint import Checkpoint
    from coldframe.loader.checkpoints.layouts import Layout
    from coldframe.loader.checkpoints.plan import Plan
    from coldframe.loader.sources.directory import DirectoryOrigin
    from coldframe.runtime.engine.spec import ModelSpec

    with closing(DirectoryOrigin(str(path))) as origin:
        checkpoint = Checkpoint.open(origin)
        plan = Plan.build(checkpoint, layout=Layout.FILE)
        spec = ModelSpec.from_config(checkpoint.config, plan.placements)
    return {
        "path": str(path),
        "family": spec.family,
        "dtype": spec.dtype,
        "weights_bytes": plan.weights_bytes,
        "read_bytes": plan.read_bytes,
        "plan_hash": plan.hash,
        "context_length": spec.context_length,
        "vocab_size": spec.vocab_size,
    }
