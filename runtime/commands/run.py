"""`coldframe run`: one cold start, one answer, the timeline."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, PlatformError, SourceError
from coldframe.loader.timeline import Recorder, now, process_start_ns
from coldframe.runtime.flags.kv import add_kv_arguments, kv_options, transfer_options
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.peers import add_peer_arguments, peer_options
from coldframe.runtime.flags.snapshots import add_snapshot_arguments, snapshot_options
from coldframe.runtime.flags.workers import add_worker_arguments, worker_options
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.units import byte_count, byte_rate

# The rest is imported when the processes are on their way: see `run`.
if TYPE_CHECKING:
    from coldframe.runtime.engine.params import SamplingParams
    from coldframe.runtime.replica.answers import TokenEvent
    from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "for_one_answer", "run", "terminate", "warn"]

_SPANS_NS = 1_000_000_000
_SNAPSHOT_NEWS = {
    "failed": "no clone could be used:",
    "created": "for the next start a worker was frozen: image",
    "not_created": "no worker was frozen for the next start:",
}
MODEL_HELP = (
    "a checkpoint's directory, s3://bucket/prefix, http(s)://host/path, peer://host:port, "
    "or a Hugging Face id"
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="the prompt")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="the prompt, read from a file; - is standard input"
    )
    prompt.add_argument("--prompt-ids", metavar="1,2,3", type=_ids, help="the prompt as token ids")
    parser.flag("-n", "--max-tokens", type=int, default=64, help="tokens to generate at most (64)")
    add_replica_arguments(parser)
    _add_sampling_arguments(parser)
    parser.flag("--json", action="store_true", help="print one JSON document and nothing else")
    parser.flag(
        "--timeline",
        metavar="FILE",
        help="write the timeline: .html a waterfall, .trace.json for chrome://tracing, else JSON",
    )
    parser.flag("--quiet", action="store_true", help="print the answer and no timeline")


def add_replica_arguments(parser: Parser) -> None:
    """The flags that say what a replica is to be."""
    parser.flag(
        "--source",
        metavar="PLACE",
        action="append",
        help="where to load from before MODEL is tried; may be given again, tried in that order",
    )
    parser.flag(
        "--layout",
        choices=["file", "aligned"],
        help="how the weights lie in memory (as the files have them for a local directory, "
        "aligned for all else)",
    )
    parser.flag(
        "--copy", action="store_true", help="never map cached weight files in place, copy them"
    )
    parser.flag(
        "--cache", metavar="DIR", help="keep what comes over a network there, for the next start"
    )
    parser.flag(
        "--cache-size",
        metavar="SIZE",
        type=byte_count,
        default=100 << 30,
        help="how much the cache may hold (100GiB)",
    )
    parser.flag(
        "--no-verify", action="store_true", help="do not hold the weights against their seal"
    )
    parser.flag(
        "--realign",
        action="store_true",
        help="once the first token is out, copy badly aligned weights to where kernels read them "
        "faster (some percent of decode, for twice the memory meanwhile)",
    )
    parser.flag(
        "--throttle", metavar="RATE", type=byte_rate, help="load at most so fast, as 200MB/s"
    )
    parser.flag(
        "--no-overlap",
        action="store_true",
        help="wait for all weights before the prefill, to measure what overlapping is worth",
    )
    add_peer_arguments(parser)
    add_snapshot_arguments(parser)
    add_kv_arguments(parser)
    add_worker_arguments(parser)


def _add_sampling_arguments(parser: Parser) -> None:
    flag = partial(parser.flag, group=parser.add_argument_group("sampling (greedy by default)"))
    flag("--temperature", type=float, default=0.0)
    flag("--top-k", type=int, default=0)
    flag("--top-p", type=float, default=1.0)
    flag("--min-p", type=float, default=0.0)
    flag("--repetition-penalty", type=float, default=1.0)
    flag("--frequency-penalty", type=float, default=0.0)
    flag("--presence-penalty", type=float, default=0.0)
    flag("--logit-bias", metavar="ID:BIAS", type=_bias, action="append")
    flag("--seed", type=int)
    flag("--stop", action="append", metavar="TEXT", help="may be given again")
    flag("--stop-token-id", action="append", type=int, metavar="ID")
    flag("--ignore-eos", action="store_true")
    flag("--logprobs", type=int, metavar="N", help="with the N likeliest tokens")


def replica_options(args: argparse.Namespace) -> ReplicaOptions:
    """The options that `add_replica_arguments` stand for.

    Raises:
        RequestError: A value says nothing that can be.
        DeviceError: Workers are to be on several devices, or there is not so much memory.
        PlatformError: A directory cannot be used.
    """
    workers = worker_options(args)
    elsewhere = bool(workers["remotes"] or workers["remotes_from"])
    return ReplicaOptions(
        model=args.model,
        sources=tuple(args.source or ()),
        copy=args.copy,
        verify=not args.no_verify,
        realign=args.realign,
        layout=args.layout,
        cache=args.cache,
        cache_bytes=args.cache_size,
        throttle=args.throttle,
        overlap=not args.no_overlap,
        snapshot=snapshot_options(args),
        **peer_options(args),
        transfer=transfer_options(args, remotes=elsewhere),
        **kv_options(args),
        **workers,
    )


def for_one_answer(options: ReplicaOptions, decode: str) -> ReplicaOptions:
    """The same without a vLLM engine beside native workers, where only the environment names it.

    It would start behind the first token of a single answer and mostly be up behind the last one.

    Args:
        options: What was asked for.
        decode: What `--decode` is, or else its twin in the environment.
    """
    bridge = options.vllm is not None and not options.vllm.alone
    if bridge and os.environ.get("COLDFRAME_DECODE") == decode:
        return replace(options, vllm=None)
    return options


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ColdframeError: There is no answer.
    """
    started = now()
    exec_ns = min(process_start_ns(), started)
    recorder = Recorder("front")
    recorder.add("interpreter", exec_ns, started, note="and imports")
    signal.signal(signal.SIGTERM, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    try:
        options = for_one_answer(replica_options(args), args.decode)
        launch = Launch(options, recorder, args.memory, args.restorer)
        launch.start_workers()
        imported = now()
        from coldframe.runtime.replica.replica import Replica

        recorder.add("imports", imported)
        with Replica(options, recorder, launch, warn=warn) as replica:
            replica.run_until(lambda: replica.known)
            params = _params(args)
            params.validate(replica.spec.vocab_size)  # here too: the workers are seconds away
            answer = _Answer(exec_ns, quiet=args.json)
            replica.submit(params, answer, prompt=_prompt(args), prompt_ids=args.prompt_ids)
            answer.follow(replica)
            # The spans of those who made the first token come behind it.
            patience = now() + _SPANS_NS
            replica.run_until(
                lambda: replica.loaded and (answer.explained(replica) or now() > patience)
            )
            document = answer.report(replica, args)
            reason = replica.facts.get("why")
            followed = options.peers or options.peers_from
            if reason and (options.sources or options.cache or followed) and not args.json:
                print(f"coldframe: {reason}", file=sys.stderr)
            if options.cache is not None:
                # The answer is out; what it cost to come here shall not be paid again.
                replica.run_until(lambda: "kept" in replica.facts)
                document["not_cached"] = why = replica.facts["kept_why_not"]
                if why is not None and not args.json:
                    print(f"coldframe: not kept in the cache: {why}", file=sys.stderr)
            document["snapshot"] = snapshot = replica.facts.get("snapshot")
            if snapshot is not None:
                from coldframe.runtime.frozen.creating import image_for_next_time

                try:
                    snapshot |= image_for_next_time(replica)
                except BaseException:
                    # Whoever ends us now has waited for the answer all the same.
                    if args.json:
                        print(json.dumps(document), flush=True)
                    raise
                for key, text in _SNAPSHOT_NEWS.items():
                    if snapshot.get(key) is not None and not args.json and not args.quiet:
                        print(f"coldframe: {text} {snapshot[key]}", file=sys.stderr)
            from coldframe.runtime.compiled.notes import eager_notice

            notice = eager_notice(replica.spans, args.model, replica.threads)
            if notice is not None and not args.json and not args.quiet:
                print(f"coldframe: {notice}", file=sys.stderr)
    except ColdframeError as error:
        if args.json:
            print(json.dumps(error.to_wire()))
        raise
    if args.json:
        print(json.dumps(document))
    return 0


class _Answer:
    """What came back, printed as it comes."""

    def __init__(self, exec_ns: int, *, quiet: bool) -> None:
        self._exec_ns = exec_ns
        self._quiet = quiet
        self._events: list[TokenEvent] = []
        self._times: list[int] = []
        self._error: ColdframeError | None = None
        from coldframe.runtime.commands.progress import ProgressBar

        self._bar = ProgressBar()

    def on_token(self, event: TokenEvent) -> None:
        self._bar.clear()
        if not self._quiet:
            _print(event.text)
        self._events.append(event)
        self._times.append(now())

    def on_error(self, error: ColdframeError) -> None:
        self._error = error

    def follow(self, replica: Replica) -> None:
        """Waits for the end of the answer.

        Raises:
            ColdframeError: It has none.
        """
        try:
            while self._error is None and not (self._events and self._events[-1].finish):
                replica.poll(0.1 if self._bar.active else None)
                self._bar.update(replica.board)
        finally:
            self._bar.clear()
        if self._events and not self._quiet:
            _print("\n")
        if self._error is not None:
            raise self._error

    def explained(self, replica: Replica) -> bool:
        """Whether it is known what the first token was waiting for."""
        return any(span.name == "prefill[head]" for span in replica.spans)

    def report(self, replica: Replica, args: argparse.Namespace) -> dict[str, Any]:
        """The timeline, on standard error or in a file, and the JSON document."""
        from coldframe.runtime.timeline.timeline import Timeline

        recorder = replica.recorder
        first = self._times[0]
        head = [s.end_ns for s in replica.spans if s.name == "prefill[head]" and s.end_ns <= first]
        recorder.add("first_token", max(head, default=first), first)
        if len(self._times) > 1:
            recorder.add("handoff", first, self._times[1], note="to the second token")
            recorder.add("decode", self._times[1], self._times[-1])
        recorder.add("last_token", self._times[-1], self._times[-1])
        timeline = Timeline([*recorder.drain(), *replica.spans], self._exec_ns, first)
        processor_s = replica.facts.get("processor_s")
        if args.timeline:
            from coldframe.runtime.timeline.export import write

            load = {"mode": replica.facts.get("mode"), "processor_s": processor_s}
            write(timeline, args.timeline, {"load": load})
        if not self._quiet and not args.quiet:
            from coldframe.runtime.timeline.text import render

            print(f"\n{render(timeline)}", file=sys.stderr)
        read = timeline.first("weight_read", "memory") or timeline.first("weight_fetch", "memory")
        last_ready = timeline.last_stage_ready_ns()
        last = self._events[-1]
        document = {
            "token_ids": [event.token for event in self._events],
            "text": "".join(event.text for event in self._events),
            "finish_reason": last.finish,
            "load_s": None if last_ready is None else timeline.seconds(last_ready),
            "first_byte_s": None if read is None else timeline.seconds(read.start_ns),
            "weights_bytes": replica.facts.get("weights_bytes"),
            "load_processor_s": processor_s,
            "memory_bytes": _memory(replica) if args.json else None,
            "load_mode": replica.facts.get("mode"),
            "load_mode_reason": replica.facts.get("why"),
            "verified": replica.facts.get("verified"),
            "restarted": replica.facts.get("restarted"),
            "device": replica.facts["device"],
            "device_why": replica.facts["device_why"],
            "token_times_s": [timeline.seconds(moment) for moment in self._times],
            **timeline.to_json(),
        }
        if args.logprobs is not None:
            document["logprobs"] = [
                {"token": e.token, "logprob": e.logprob, "top": [list(pair) for pair in e.top]}
                for e in self._events
            ]
        return document


def _memory(replica: Replica) -> int | None:
    """What all its processes have now, behind the answer."""
    from coldframe.runtime.replica.replica_memory import pss_of

    return pss_of(os.getpid(), replica.pids.values())


def warn(what: str) -> None:
    """Says on standard error what does not go as it was asked for."""
    print(f"coldframe: {what}", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    """Writes a part of the answer to standard output, at once.

    Raises:
        PlatformError: It cannot be written, to a full disk for example.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PlatformError(
            "the answer cannot be written", where="standard output", got=error.strerror
        ) from error


def _prompt(args: argparse.Namespace) -> str | None:
    if args.prompt_file is None:
        text: str | None = args.prompt
        return text
    try:
        if args.prompt_file == "-":
            return sys.stdin.buffer.read().decode()
        with open(args.prompt_file, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            "cannot read the prompt", where=args.prompt_file, got=str(error)
        ) from error


def _params(args: argparse.Namespace) -> SamplingParams:
    from coldframe.runtime.engine.params import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        logit_bias=dict(args.logit_bias or ()),
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=tuple(args.stop or ()),
        stop_token_ids=tuple(args.stop_token_id or ()),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of token ids; write 1,2,3") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no bias; write ID:BIAS") from None


def terminate(number: int, _: FrameType | None) -> None:
    """Ends this process by a signal, with all that it has started."""
    # Through the stack, so that the replica is closed on the way.
    raise SystemExit(128 + number)
