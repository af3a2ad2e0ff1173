"""`coldframe bench cold MODEL`: the cold start, from the exec to the first token.

What is measured is a declared matrix (`matrix`): tiers, states of the page cache, sources, engines,
through HTTP and without. Each cell is started again and again as real processes, all cells in turn,
and held against the time that its bytes take on the same path by themselves. Other programs can be
started beside it (`--beside`), and an earlier document be held against it (`--baseline`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

from coldframe.benchmarks.cold.arguments import about, add_arguments, blocks
from coldframe.benchmarks.cold.baseline import check_same, compare, fails, read_baseline
from coldframe.benchmarks.cold.contender import CONTENDERS, Asked, Contender, contender
from coldframe.benchmarks.cold.matrix import AXES, Cell, cells_of
from coldframe.benchmarks.cold.progress import Progress
from coldframe.benchmarks.cold.rounds import Rounds
from coldframe.benchmarks.cold.sources import Sources
from coldframe.benchmarks.cold.standby import Engine, Standby
from coldframe.benchmarks.cold.starts import Starter
from coldframe.benchmarks.cold.summary import Measured, Rival, cell_document, rival_document
from coldframe.benchmarks.cold.table import table
from coldframe.benchmarks.document import document
from coldframe.benchmarks.harness import words
from coldframe.benchmarks.http_client import FIRST_ID
from coldframe.benchmarks.interruption import Terminated
from coldframe.benchmarks.output import deliver
from coldframe.loader.errors import PlatformError
from coldframe.runtime.machine.free_memory import rest_of

__all__ = ["add_arguments", "run", "status"]

_REHEARSALS = 3


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints its table and the document.

    Returns:
        1 where tokens differ, a start of ours failed, or a cell is slower than its baseline; 130
        or 143 where Ctrl-C or SIGTERM has ended it with some rounds finished; else 0.

    Raises:
        RequestError: The arguments make no sense.
        CheckpointError: MODEL is no sound checkpoint.
        PlatformError: Nothing of it can be measured here.
    """
    cells, left_out = cells_of(blocks(args))
    known = about(args)
    was = None
    if args.baseline is not None:
        was = read_baseline(args.baseline)
        if not args.any_baseline:
            check_same(was, known, args.baseline)
    if sys.dont_write_bytecode:
        print("no bytecode is kept: each process compiles all that it imports", file=sys.stderr)
    rounds = _measure(args, known["model"], cells, left_out)
    if not rounds.cells and not rounds.rivals:
        raise PlatformError(
            "nothing of it can be measured here",
            got="; ".join(f"{each['what']}: {each['why']}" for each in left_out),
        )
    made = _cells(rounds)
    against = None
    if was is not None:
        limit = 0.1 if args.fail_if_slower is None else args.fail_if_slower
        against = compare(was, made, rounds.lost, args.baseline, limit)
    found = document(
        "cold",
        **{name: known[name] for name in ("model", "prompt_tokens", "answer_tokens")},
        runs=rounds.done,
        rest_s=rounds.rest_s,
        interrupted=rounds.interrupted is not None,
        cells=made,
        left_out=left_out,
        failed=rounds.failed,
        baseline=against,
        fingerprint=known["fingerprint"],
    )
    deliver(found, [table(found)], args.output, alone=args.json)
    if rounds.interrupted is not None:
        number = SIGTERM if isinstance(rounds.interrupted, Terminated) else SIGINT
        return 128 + number
    return status(found, any_tokens=args.any_tokens)


def _measure(
    args: argparse.Namespace,
    model: Mapping[str, Any],
    cells: Sequence[Cell],
    left_out: list[dict[str, str]],
) -> Rounds:
    """All rounds; what cannot be measured is in `left_out` then.

    Raises:
        PlatformError: No start of this model is possible here.
    """
    # Ids that any vocabulary has, and the next ones, too.
    span = min(997, model["vocab_size"] - FIRST_ID - 2)
    prompt = [FIRST_ID + (7 * i) % span for i in range(args.prompt_tokens)]
    nbytes = model["read_bytes"]
    measured = [Measured(cell, 0 if cell.rests else nbytes) for cell in cells]
    rivals, others = _rivals(args, prompt, nbytes)
    left_out += others
    no_memory: set[str] = set()
    with _scratch(args.snapshot_store) as (scratch, store):
        engine = Engine(args.vllm_python, args.vllm_kv)
        standby = Standby(args.model, store, scratch / "t", engine)
        with Sources(args.model, scratch) as sources, Progress() as progress:
            starter = Starter(sources, standby, scratch, prompt, args.tokens, no_memory)
            rehearsals = 0 if args.no_plan else min(args.runs, _REHEARSALS)
            rounds = Rounds(
                *(args.model, sources, starter, len(prompt), args.tokens),
                *(measured, rivals, left_out, rehearsals, rest_of(args)),
            )
            rounds.check(progress)
            rounds.warm_up(progress)
            progress.expect((len(rounds.cells) + len(rounds.rivals)) * args.runs)
            rounds.run(args.runs, progress)
    left_out += [{"what": "memory", "why": why} for why in sorted(no_memory)]
    return rounds


def _cells(rounds: Rounds) -> list[dict[str, Any]]:
    """Those of the document; all are to give the first one's tokens."""
    if rounds.cells:
        reference = rounds.cells[0].starts[0].tokens
    else:
        reference = rounds.rivals[0][1].outcomes[0].tokens
    return [
        *(cell_document(each, reference) for each in rounds.cells),
        *(rival_document(rival, reference) for _, rival in rounds.rivals),
    ]


def status(found: Mapping[str, Any], *, any_tokens: bool) -> int:
    """The exit status for a document.

    Args:
        found: The document.
        any_tokens: Whether cells may give other tokens than the first.
    """
    differ = not any_tokens and not all(cell["tokens_equal"] for cell in found["cells"])
    # Others' programs stand beside it; it is not they who are tested.
    failed = [name for name in found["failed"] if name.partition("/")[0] not in CONTENDERS]
    return 1 if differ or failed or fails(found["baseline"]) else 0


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
