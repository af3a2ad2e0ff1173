"""`coldframe bench handoff MODEL`: from a request's first token to its second.

The first token is a prefill worker's, the second one a decode worker's, and between them lies the
hand-off. It costs what the gap between the two takes beyond a step, the mean gap between the
tokens behind them. By the length of the prompt, with nobody else decoding and with some who do:

    shared      within a device: the KV stays where it is, blocks change hands
    devices     to a decode worker on a second GPU, which copies it there
    tcp         to a decode worker in a replica of its own, as on another host: over loopback
    nixl        the same, the KV by NIXL
    vllm        to a vLLM engine, which copies it into its own (`bench vllm-handoff` looks inside)
    recomputed  the KV is gone, as when its lease has run out: a decode worker computes it again
    cold        shared, in a cold start: `handoff` and `decode` of its timeline

All but the last are of warm replicas, by the moments at which tokens reach the front, turn by turn.
Where others decode, the hand-off also waits for the step that they are in.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import document, figure
from coldframe.benchmarks.handoff_ways import (
    FIRST_ID,
    WAYS,
    Handed,
    Replicated,
    cold_handoff,
    left_out,
    start_replica,
)
from coldframe.benchmarks.harness import chosen, warm_page_cache
from coldframe.benchmarks.machine import fingerprint
from coldframe.benchmarks.output import (
    add_output_arguments,
    check_output,
    columns,
    deliver,
    described,
)
from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.replica.sizing import ModelFacts

__all__ = ["add_arguments", "run"]

_MOST_S = 0.010
_WARM_UP = 2
_HALF_BYTES = 2


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    # Without twins in the environment: other commands mean other things by these words.
    parser.add_argument("--ways", help=f"some of {', '.join(WAYS)} (all that can be had here)")
    parser.add_argument(
        "--prompt-tokens", default="64,512,2048", help="lengths of prompts (64,512,2048)"
    )
    parser.add_argument("--busy", default="0,4,8", help="others that decode meanwhile (0,4,8)")
    parser.add_argument("--answer-tokens", type=int, default=16, help="of each request (16)")
    parser.add_argument("--runs", type=int, default=9, help="runs of each cell (9)")
    parser.flag("--pin", action="store_true", help="half of the cores for each role, as in serve")
    parser.flag("--vllm-python", metavar="PATH", type=Path, help="an interpreter that has vLLM")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; the exit status says whether targets are met, and our own tokens equal.

    Raises:
        RequestError: The arguments make no sense.
        ColdframeError: A replica failed.
    """
    facts, ways, lengths, busy, missing = _prepare(args)
    found: dict[tuple[str, int, int], list[Handed]] = {}
    warm_page_cache(args.model)
    with ExitStack() as stack:
        replicas: dict[str, Replicated] = {}
        for way in ways:
            if way != "cold":
                _say(f"starting {way}")
                replicas[way] = start_replica(stack, way, args)
        for number in range(-_WARM_UP, args.runs):
            _say(f"run {number + 1} of {args.runs}")
            for length in lengths:
                for others in busy:
                    prompt = _prompt(number, length, others, facts.spec.vocab_size)
                    order = list(replicas) if number % 2 else list(reversed(replicas))
                    for way in order:
                        handed = replicas[way].hand(prompt, args.answer_tokens, others)
                        if number >= 0:
                            found.setdefault((way, length, others), []).append(handed)
                if "cold" in ways and number >= 0:
                    prompt = _prompt(number, length, 0, facts.spec.vocab_size)
                    handed = cold_handoff(args.model, prompt, args.answer_tokens)
                    found.setdefault(("cold", length, 0), []).append(handed)
    token_bytes = facts.spec.kv_token_bytes(facts.spec.dtype_bytes)
    cells = [
        _cell(way, length, others, handed, found, token_bytes)
        for (way, length, others), handed in found.items()
    ]
    targets = [_target(cell) for cell in cells if (cell["way"], cell["busy"]) == ("shared", 0)]
    told = document(
        "handoff",
        model=described(args.model, facts),
        runs=args.runs,
        answer_tokens=args.answer_tokens,
        left_out=missing,
        cells=cells,
        targets=targets,
        fingerprint=fingerprint(
            device=args.device,
            model=args.model,
            vllm_python=args.vllm_python if any(way.startswith("vllm") for way in ways) else None,
        ),
    )
    deliver(told, _table(told), args.output, alone=args.json)
    # 16 bits are rounded in another order by another engine, and where a prompt is computed again
    # in pieces of another size: that may come to other tokens.
    rounds = {"vllm"} if facts.spec.dtype_bytes > _HALF_BYTES else {"vllm", "recomputed"}
    differ = any(cell["tokens_equal"] is False for cell in cells if cell["way"] not in rounds)
    return 0 if all(target["met"] for target in targets) and not differ else 1


def _prompt(number: int, length: int, others: int, vocabulary: int) -> list[int]:
    draw = random.Random(f"{number} {length} {others}")
    return draw.choices(range(FIRST_ID, vocabulary), k=length)


def _prepare(
    args: argparse.Namespace,
) -> tuple[ModelFacts, list[str], list[int], list[int], list[dict[str, str]]]:
    """The model, the ways there are, lengths of prompts, how many others, and what is left out."""
    check_output(args.output)
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.runs < 1:
        raise RequestError("there must be a run", where="--runs", got=args.runs)
    if args.answer_tokens < 4:
        raise RequestError(
            "a step is seen behind the second token only",
            where="--answer-tokens",
            expected="at least 4",
            got=args.answer_tokens,
        )
    facts = ModelFacts(str(args.model))
    lengths = _numbers(args.prompt_tokens, "--prompt-tokens", 1)
    busy = _numbers(args.busy, "--busy", 0)
    wanted = chosen(args.ways, WAYS)
    missing = left_out(wanted, args)
    most = facts.spec.context_length - args.answer_tokens
    for length in [length for length in lengths if length > most]:
        why = f"with its answer it does not fit the context of {facts.spec.context_length}"
        missing.append({"what": f"a prompt of {length} tokens", "why": why})
    lengths = [length for length in lengths if length <= most]
    if not lengths:
        raise RequestError(
            "no prompt fits the model's context",
            where="--prompt-tokens",
            expected=f"at most {most}",
            got=args.prompt_tokens,
        )
    ways = [way for way in wanted if way not in {entry["what"] for entry in missing}]
    if not ways:
        raise RequestError(
            "there is nothing to measure", where="--ways", got="; ".join(m["why"] for m in missing)
        )
    return facts, ways, lengths, busy, missing


def _numbers(text: str, where: str, least: int) -> list[int]:
    """Numbers with commas between them, each once.

    Raises:
        RequestError: It is no such text.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise RequestError(
            "these are no numbers",
            where=where,
            expected=f"numbers from {least}, with commas between them",
            got=repr(text),
        )
    return list(dict.fromkeys(map(int, words)))


def _cell(
    way: str,
    length: int,
    others: int,
    handed: Sequence[Handed],
    found: dict[tuple[str, int, int], list[Handed]],
    token_bytes: int,
) -> dict[str, Any]:
    beyond = [one.second_s - one.step_s for one in handed]
    nbytes = length * token_bytes
    own = found.get(("shared", length, others))
    equal = None
    if way != "shared" and own is not None:
        equal = [one.tokens for one in handed] == [one.tokens for one in own]
    return {
        "id": f"{way}/{length}/{others}",
        "way": way,
        "prompt_tokens": length,
        "busy": others,
        "clock": "spans" if way == "cold" else "tokens",
        "ttft": figure([one.ttft_s for one in handed], "s"),
        "second": figure([one.second_s for one in handed], "s"),
        "step": figure([one.step_s for one in handed], "s"),
        "beyond": figure(beyond, "s"),
        "bytes": nbytes,
        # Of what takes no longer than a step there is no telling.
        "rate": figure([nbytes / s for s in beyond], "B/s") if min(beyond) > 0 else None,
        "tokens_equal": equal,
    }


def _target(cell: dict[str, Any]) -> dict[str, Any]:
    value = cell["beyond"]["median"]
    return {
        "name": f"{cell['id']}: beyond a step, in seconds",
        "value": value,
        "most": _MOST_S,
        "least": None,
        "met": value <= _MOST_S,
    }


def _table(told: dict[str, Any]) -> list[str]:
    rows = [["", "prompt", "busy", "KV", "TTFT", "second", "step", "beyond", "p90", "rate", "same"]]
    for cell in told["cells"]:
        rate = cell["rate"]
        times = [cell[name]["median"] for name in ("ttft", "second", "step", "beyond")]
        times.append(cell["beyond"]["p90"])
        rows.append(
            [
                *(cell["way"], str(cell["prompt_tokens"]), str(cell["busy"])),
                f"{cell['bytes'] / 1e6:.2f} MB",
                *(f"{1e3 * seconds:.2f} ms" for seconds in times),
                "-" if rate is None else f"{rate['median'] / 1e9:.2f} GB/s",
                {None: "", True: "yes", False: "no"}[cell["tokens_equal"]],
            ]
        )
    lines = columns(rows)
    for target in told["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        lines.append(f"{target['name']}: {target['value']:.4f} <= {target['most']:g}  {verdict}")
    lines += [f"left out: {entry['what']}: {entry['why']}" for entry in told["left_out"]]
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
