"""`coldframe bench cold MODEL`: the cold start, from the exec to the first token.

What is measured is a declared matrix (`matrix`): tiers, states of the page cache, sources, engines,
through HTTP and without. Each cell is started again and again as real processes, all cells in turn,
and held against the time that its bytes take on the same path by themselves. Other programs can be
started beside it (`--beside`), and an earlier document be held against it (`--baseline`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from coldframe.benchmarks.cold.baseline import check_same, compare, fails, read_baseline, share
from coldframe.benchmarks.cold.contender import CONTENDERS, Asked, Contender, contender
from coldframe.benchmarks.cold.matrix import (
    AXES,
    DEFAULT,
    QUICK,
    blocks_of,
    cells_of,
    read_matrix,
)
from coldframe.benchmarks.cold.progress import Progress
from coldframe.benchmarks.cold.rounds import Rounds
from coldframe.benchmarks.cold.sources import Sources
from coldframe.benchmarks.cold.standby import Engine, Standby
from coldframe.benchmarks.cold.starts import Starter
from coldframe.benchmarks.cold.summary import Measured, Rival, cell_document, rival_document
from coldframe.benchmarks.cold.table import table
from coldframe.benchmarks.document import document, print_document
from coldframe.benchmarks.harness import fingerprint, words
from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.flags import Parser
from coldframe.runtime.units import byte_count

__all__ = ["add_arguments", "run"]

_AXES = (*AXES, "throttle")
_KEPT = {"BUILD", "CRIU", "DEVICE", "NVIDIA_PROC", "RUN_DIR", "TEST_DEVICE", "THREADS"}
"""Settings in the environment that are the machine's; all others would be a cell's."""


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
    parser.flag("--json", action="store_true", help="print the JSON document alone")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the document there, too")


def _share(text: str) -> float:
    try:
        return share(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its table and the document.

    Returns:
        1 where tokens differ, a start failed, or a cell is slower than its baseline; else 0.

    Raises:
        RequestError: The arguments make no sense.
        CheckpointError: MODEL is no sound checkpoint.
        PlatformError: Nothing of it can be measured here.
    """
    cells, left_out = cells_of(_blocks(args))
    about = _checked(args)
    was = None
    if args.baseline is not None:
        was = read_baseline(args.baseline)
        if not args.any_baseline:
            check_same(was, about, args.baseline)
    _forget_settings()
    if sys.dont_write_bytecode:
        print("no bytecode is kept: each process compiles all that it imports", file=sys.stderr)
    prompt = [5 + (7 * i) % 997 for i in range(args.prompt_tokens)]
    rivals, others = _rivals(args, prompt, about["model"]["read_bytes"])
    left_out += others
    no_memory: set[str] = set()
    with _scratch(args.snapshot_store) as (scratch, store):
        engine = Engine(args.vllm_python, args.vllm_kv)
        standby = Standby(args.model, store, scratch / "t", engine)
        with Sources(args.model, scratch) as sources:
            starter = Starter(sources, standby, scratch, prompt, args.tokens, no_memory)
            nbytes = about["model"]["read_bytes"]
            measured = [Measured(cell, 0 if cell.rests else nbytes) for cell in cells]
            rounds = Rounds(
                *(args.model, sources, starter, len(prompt), args.tokens),
                *(measured, rivals, left_out, not args.no_plan),
            )
            with Progress((len(cells) + len(rivals)) * args.runs) as progress:
                rounds.check(progress)
                if measured:
                    rounds.warm_up(progress)
                rounds.run(args.runs, progress)
    left_out += [{"what": "memory", "why": why} for why in sorted(no_memory)]
    if not measured and not rivals:
        raise PlatformError(
            "nothing of it can be measured here",
            got="; ".join(f"{each['what']}: {each['why']}" for each in left_out),
        )
    reference = _reference(measured, rivals)
    made = [
        *(cell_document(each, reference) for each in measured),
        *(rival_document(rival, reference) for _, rival in rivals),
    ]
    against = None
    if was is not None:
        limit = 0.1 if args.fail_if_slower is None else args.fail_if_slower
        against = compare(was, made, rounds.lost, args.baseline, limit)
    found = document(
        "cold",
        **{name: about[name] for name in ("model", "prompt_tokens", "answer_tokens")},
        runs=args.runs,
        cells=made,
        left_out=left_out,
        failed=rounds.failed,
        baseline=against,
    )
    found["fingerprint"] = about["fingerprint"]
    if not args.json:
        print(table(found))
    if args.output is not None:
        _write(found, args.output)
    print_document(found)
    differ = not args.any_tokens and not all(cell["tokens_equal"] for cell in made)
    return 1 if differ or rounds.failed or fails(against) else 0


def _blocks(args: argparse.Namespace) -> Any:
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


def _checked(args: argparse.Namespace) -> dict[str, Any]:
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
    output = args.output
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise RequestError(
            "the document cannot be written there",
            where="--output",
            expected="a file in a folder that there is",
            got=output,
        )
    words(args.beside, CONTENDERS)
    model = _model(args.model)
    if args.prompt_tokens + args.tokens > model["context_length"]:
        raise RequestError(
            "the request is longer than the model's context",
            where="--prompt-tokens, --tokens",
            expected=f"at most {model['context_length']} together",
            got=args.prompt_tokens + args.tokens,
        )
    machine = {**fingerprint(), "device": args.device}
    if args.vllm_python is not None:
        machine["vllm_python"] = str(args.vllm_python)
    return {
        "model": model,
        "fingerprint": machine,
        "prompt_tokens": args.prompt_tokens,
        "answer_tokens": args.tokens,
    }


def _model(path: Path) -> dict[str, Any]:
    from coldframe.loader.checkpoint import Checkpoint
    from coldframe.loader.layouts import Layout
    from coldframe.loader.plan import Plan
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
    }


def _rivals(
    args: argparse.Namespace, prompt: list[int], nbytes: int
) -> tuple[list[tuple[Contender, Rival]], list[dict[str, str]]]:
    """Contenders, each with a cold and a warm page cache; and those that cannot be had."""
    asked = Asked(args.model, prompt, args.tokens, args.device, args.vllm_python)
    caches = words(args.cache, AXES["cache"]) if args.cache else list(AXES["cache"])
    found: list[tuple[Contender, Rival]] = []
    left_out = []
    for name in words(args.beside, CONTENDERS):
        try:
            made = contender(name, asked)
        except PlatformError as error:
            left_out.append({"what": name, "why": str(error)})
            continue
        found += [(made, Rival(made.name, made.through, cache, nbytes)) for cache in caches]
    return found, left_out


def _reference(measured: list[Measured], rivals: list[tuple[Contender, Rival]]) -> tuple[int, ...]:
    """The tokens that all are to give: the first cell's."""
    return measured[0].starts[0].tokens if measured else rivals[0][1].outcomes[0].tokens


@contextmanager
def _scratch(store: Path | None) -> Iterator[tuple[Path, Path]]:
    """A directory for run directories, whose sockets need a short path, and one for images."""
    where = os.environ.get("COLDFRAME_RUN_DIR")
    with (
        tempfile.TemporaryDirectory(prefix="cf-", dir=where) as scratch,
        tempfile.TemporaryDirectory(prefix="coldframe-bench-") as images,
    ):
        if store is not None:
            store.mkdir(parents=True, exist_ok=True)
        yield Path(scratch), Path(images) if store is None else store.absolute()


def _forget_settings() -> None:
    """Takes coldframe's settings out of the environment, but for those of the machine.

    They would be those of every process that is started, and change what a cell is.
    """
    for name in list(os.environ):
        if name.startswith("COLDFRAME_") and name.removeprefix("COLDFRAME_") not in _KEPT:
            del os.environ[name]


def _write(found: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        print_document(found)
        raise PlatformError(
            "the document cannot be written", where=path, got=error.strerror
        ) from error
