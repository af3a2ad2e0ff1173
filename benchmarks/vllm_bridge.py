"""`coldframe bench vllm-bridge MODEL`: what a vLLM engine beside native workers costs and gives.

Two things, each against what it is to be like:

    first token    of a cold replica with bridge decode (`--decode native,vllm`), and of one without
    decode         tokens a second of a batch after the engine has taken over, and of vLLM's engine
                   alone with weights and loader of its own, as many threads and the same prompts

Of a batch counts the time in which all of it is decoded: from when each request has some tokens to
when the first one ends. Both sides are taken in turns, since machines have moods; where others use
the machine meanwhile, the processor time of the two engines says more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from coldframe.benchmarks.harness import Row, cold_start, print_rows, warm_page_cache
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.errors import ColdframeError, PlatformError, RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.integrations.vllm.environment import own_places
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.runtime.units import byte_count

__all__ = ["add_arguments", "run"]

_PROMPT = [5 + (7 * i) % 997 for i in range(64)]
_FIRST_TOKEN, _DECODE = 1.10, 0.95
_WARM = 4
"""Tokens that each request has before a batch counts."""
_START_S = 300.0
_PLAIN = """
import json, sys, time
asked = json.loads(sys.argv[1])
from vllm import EngineArgs, LLMEngine, SamplingParams
engine = LLMEngine.from_engine_args(EngineArgs(**asked["engine"]))
for line in sys.stdin:
    for number, prompt in enumerate(asked["prompts"]):
        params = SamplingParams(
            temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
        )
        engine.add_request(f"{line.strip()}-{number}", {"prompt_token_ids": prompt}, params)
    times = []
    while engine.has_unfinished_requests():
        made = [[o.request_id, len(o.outputs[0].token_ids)] for o in engine.step()]
        times.append([time.monotonic(), made])
    print(json.dumps(times), flush=True)
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint's directory")
    parser.flag("--vllm-python", metavar="PATH", default=sys.executable, help="that has vLLM")
    parser.flag("--runs", type=int, default=5, help="cold starts and batches of each kind (5)")
    parser.flag("--batch", type=int, default=8, help="requests at a time (8)")
    parser.flag("--tokens", type=int, default=128, help="tokens of each answer (128)")
    parser.flag("--vllm-kv", type=byte_count, default=256 << 20, help="for vLLM's KV (256MiB)")
    parser.flag("--json", action="store_true", help="print the JSON document alone")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table; the exit status says whether its targets are met.

    Raises:
        RequestError: The arguments make no sense.
        PlatformError: A replica or vLLM failed.
    """
    if not args.model.is_dir():
        raise RequestError("there is no such directory", where="MODEL", got=args.model)
    if args.runs < 1 or args.batch < 1 or args.tokens < 4 * _WARM:
        raise RequestError("there must be some", where="--runs, --batch, --tokens")
    warm_page_cache(args.model)
    prompts = [[*_PROMPT, 5 + number] for number in range(args.batch)]
    alone, beside = _cold_starts(args)
    (ours, ours_cpu), (plain, plain_cpu) = _batches(args, prompts)
    rows = [
        Row("native decode: TTFT", alone, "s"),
        Row("bridge decode: TTFT", beside, "s"),
        Row("bridge / native", _ratios(beside, alone), "ratio", _FIRST_TOKEN),
        Row(f"replica, batch {args.batch}: decode", ours, "tok/s"),
        Row(f"vLLM alone, batch {args.batch}: decode", plain, "tok/s"),
        Row("replica / vLLM alone", _ratios(ours, plain), "ratio", _DECODE, at_least=True),
        Row("replica's engine: processor time a token", ours_cpu, "s"),
        Row("vLLM alone: processor time a token", plain_cpu, "s"),
        Row("replica's engine / vLLM alone, processor time", _ratios(ours_cpu, plain_cpu), "ratio"),
    ]
    more = {"model": str(args.model), "runs": args.runs, "threads": cpu_count()}
    print_rows(rows, more, table=not args.json)
    return 0 if all(row.met is not False for row in rows) else 1


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _cold_starts(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds to the first token, without and with an engine that is to come."""
    bridge = ["--decode", "native,vllm", "--vllm-python", args.vllm_python]
    bridge += ["--vllm-kv", str(args.vllm_kv)]
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(args.runs):
        print(f"cold start {number + 1} of {args.runs}", file=sys.stderr)
        for flags, times in zip(([], bridge), found, strict=True):
            document = cold_start(args.model, *flags, prompt_ids=_PROMPT, tokens=8)
            times.append(document["ttft_s"])
    return found


def _batches(
    args: argparse.Namespace, prompts: list[list[int]]
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """Of a replica whose engine has taken over, and of vLLM alone, batch by batch.

    Returns:
        Of each, tokens a second, and seconds of processor time of the engine's process a token.
    """
    from coldframe.runtime.replica.replica import Replica

    vllm = VllmOptions(args.vllm_python, kv_bytes=args.vllm_kv)
    options = ReplicaOptions(str(args.model), vllm=vllm)
    speeds: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    with _Plain(args, prompts) as plain, Replica(options) as replica:

        def batch() -> list[tuple[float, str]]:
            return _answers(replica.submit, replica.run_until, prompts, args.tokens)

        replica.run_until(lambda: replica.known)
        batch()
        deadline = time.monotonic() + _START_S
        replica.run_until(lambda: replica.staff["vllm"]["up"] > 0 or time.monotonic() > deadline)
        if not replica.staff["vllm"]["up"]:
            raise PlatformError("vLLM did not come up", expected=f"within {_START_S:g} s")
        for number in range(-1, args.runs):
            print(f"batch {number + 1} of {args.runs}", file=sys.stderr)
            (engine,) = (pid for name, pid in replica.pids.items() if name.startswith("vllm"))
            for side, (pid, measure) in enumerate(((engine, batch), (plain.pid, plain.batch))):
                before = _processor_s(pid)
                speed = _speed(measure(), args.batch, args.tokens)
                if number >= 0:  # the first one warms up
                    speeds[side].append(speed)
                    used = _processor_s(pid) - before
                    processor[side].append(used / (args.batch * args.tokens))
    return (speeds[0], processor[0]), (speeds[1], processor[1])


def _processor_s(pid: int) -> float:
    """Processor time of all threads of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Client:
    def __init__(self, name: str, times: list[tuple[float, str]]) -> None:
        self._name, self._times = name, times
        self.over = False
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self._times.append((time.monotonic(), self._name))
        self.over = event.finish is not None

    def on_error(self, error: ColdframeError) -> None:
        self.over, self.error = True, error


def _answers(
    submit: Callable[..., str],
    run_until: Callable[[Callable[[], bool]], None],
    prompts: list[list[int]],
    tokens: int,
) -> list[tuple[float, str]]:
    """When each token of a batch came, and whose it was."""
    times: list[tuple[float, str]] = []
    clients = [_Client(str(number), times) for number in range(len(prompts))]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for client, prompt in zip(clients, prompts, strict=True):
        submit(params, client, prompt_ids=tuple(prompt))
    run_until(lambda: all(client.over for client in clients))
    for client in clients:
        if client.error is not None:
            raise client.error
    return times


class _Plain:
    """vLLM's engine in a process of its own, which nobody shares anything with.

    Args:
        args: The command line.
        prompts: What it is asked, again and again.
    """

    def __init__(self, args: argparse.Namespace, prompts: list[list[int]]) -> None:
        engine = {
            "model": str(args.model),
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "kv_cache_memory_bytes": args.vllm_kv,
            "max_model_len": 1024,
        }
        asked = {"engine": engine, "prompts": prompts, "tokens": args.tokens}
        threads = str(cpu_count())
        with ExitStack() as stack:
            places = stack.enter_context(own_places(os.environ))
            self._process = subprocess.Popen(
                [args.vllm_python, "-P", "-c", _PLAIN, json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": threads,
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_LOGGING_LEVEL": "ERROR",
                    "HF_HUB_OFFLINE": "1",
                    **places,
                },
            )
            self._places = stack.pop_all()
        self._number = 0

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._places.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def batch(self) -> list[tuple[float, str]]:
        """As `_answers`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._number += 1
        self._process.stdin.write(f"{self._number}\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) and not line.startswith("[["):
            pass  # what vLLM says besides
        if not line:
            raise PlatformError("vLLM's own engine failed", got=f"{self._process.poll()}")
        times, had = [], dict[str, int]()
        for moment, made in json.loads(line):
            for name, tokens in made:
                times += [(moment, name)] * (tokens - had.get(name, 0))
                had[name] = tokens
        return times


def _speed(times: list[tuple[float, str]], batch: int, tokens: int) -> float:
    """Tokens a second while all of a batch is decoded."""
    had: dict[str, int] = {}
    begun: float | None = None
    counted = 0
    for moment, name in times:
        had[name] = had.get(name, 0) + 1
        if begun is not None:
            counted += 1
            if had[name] == tokens:
                return counted / (moment - begun)
        elif len(had) == batch and min(had.values()) >= _WARM:
            begun = moment
    raise PlatformError("a batch was never decoded together", got=str(had))
