"""`coldframe batch`: one cold start, a file of requests answered, and back to zero."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import time
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.loader.timeline import Recorder, now, process_start_ns
from coldframe.runtime.batch.input import CHAT, LineReader, open_input
from coldframe.runtime.batch.intake import Intake, Tally
from coldframe.runtime.batch.output import Answers
from coldframe.runtime.commands.run import MODEL_HELP, add_replica_arguments, replica_options, warn
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import model_name
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.units import byte_count

# The rest is imported when the processes are on their way: see `_Run`.
if TYPE_CHECKING:
    from coldframe.runtime.batch.batch import Batch
    from coldframe.runtime.batch.report import Startup
    from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    parser.description = (
        "One cold start, every line of IN.jsonl answered, and back to zero. A line is a request as "
        "OpenAI's batches have it: custom_id, method, url (/v1/chat/completions or "
        "/v1/completions) and body. Answers are added to OUT.jsonl in the order in which they are "
        "done, not in that of IN.jsonl; custom_id says whose each is. Started again, a batch goes "
        "on where it was: what has its answer is passed over."
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "input", metavar="IN.jsonl", help="the requests, one a line; - is standard input"
    )
    parser.add_argument("output", metavar="OUT.jsonl", help="the answers, one a line")
    parser.flag(
        "--concurrency", metavar="N", type=int, default=32, help="sequences decoded at once (32)"
    )
    parser.flag(
        "--max-line",
        metavar="SIZE",
        type=byte_count,
        default=8 << 20,
        help="a line at most; a longer one is refused, by itself (8MiB)",
    )
    parser.flag(
        "--drain",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="how long running requests may take after SIGTERM or Ctrl-C; a second ends at once "
        "(10)",
    )
    parser.flag("--model-name", metavar="NAME", help="as the requests call it (MODEL's last part)")
    parser.flag(
        "--chat-template", metavar="FILE", help="a Jinja template in place of the checkpoint's"
    )
    add_replica_arguments(parser)
    parser.flag("--json", action="store_true", help="print one JSON document and nothing else")
    parser.flag(
        "--timeline",
        metavar="FILE",
        help="write the timeline of the start: .html a waterfall, .trace.json for "
        "chrome://tracing, else JSON",
    )
    parser.flag("--quiet", action="store_true", help="say nothing of how it goes")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ColdframeError: It cannot begin, or cannot go on. Started again, it goes on there.
    """
    stop = _Stop()
    try:
        _check(args)
        _Run(args, stop).go()
    except ColdframeError as error:
        if args.json:
            print(json.dumps(error.to_wire()))
        raise
    return 0 if stop.number is None else 128 + stop.number


def _check(args: argparse.Namespace) -> None:
    if args.concurrency < 1:
        raise RequestError(
            "there must be a sequence to decode",
            where="--concurrency",
            expected="at least 1",
            got=args.concurrency,
        )
    if not 0 <= args.drain < math.inf:
        raise RequestError(
            "this is no time to wait", where="--drain", expected="seconds", got=args.drain
        )


class _Stop:
    """SIGTERM and SIGINT: while there are tokens the first one asks, any other ends at once."""

    def __init__(self) -> None:
        self.gentle = False
        """Whether there is something to finish."""
        self.number: int | None = None
        """The signal that has asked."""
        self._asked_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def left(self, drain_s: float) -> float | None:
        """How many seconds are left to finish what runs; None while nobody has asked."""
        if self.number is None:
            return None
        return max(0.0, self._asked_at + drain_s - time.monotonic())

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.gentle or self.number is not None:
            # Through the stack, so that the replica is closed on the way.
            raise SystemExit(128 + number)
        self.number, self._asked_at = number, time.monotonic()


class _Run:
    """A batch from the exec to its end.

    Args:
        args: The command's.
        stop: Says when to end early.
    """

    def __init__(self, args: argparse.Namespace, stop: _Stop) -> None:
        started = now()
        self._args = args
        self._stop = stop
        self._exec_ns = min(process_start_ns(), started)
        self._recorder = Recorder("front")
        self._recorder.add("interpreter", self._exec_ns, started, note="and imports")
        self._tally = Tally()
        self._silent = args.quiet or args.json

    def go(self) -> None:
        args = self._args
        began = now()
        with (
            closing(LineReader(open_input(args.input), args.input, args.max_line)) as reader,
            Answers(args.output, os.fstat(reader.fd)) as answers,
        ):
            intake = Intake(reader, answers, self._tally)
            found = intake.any()
            self._recorder.add("queue", began, note="to the first line without an answer")
            if found:
                self._load(intake, answers)
                return
        _dismiss(args)
        from coldframe.runtime.batch.report import document

        self._finish(document(self._tally, self._seconds()))

    def _load(self, intake: Intake, answers: Answers) -> None:
        args, recorder = self._args, self._recorder
        options = replica_options(args)
        launch = Launch(options, recorder, args.memory, args.restorer)
        launch.start_workers()
        imported = now()
        from coldframe.runtime.gateway.renderer import Renderer
        from coldframe.runtime.replica.replica import Replica

        recorder.add("imports", imported)
        with (
            Replica(options, recorder, launch, warn=warn) as replica,
            closing(Renderer()) as renderer,
        ):
            if intake.first is not None and intake.first.url == CHAT:
                renderer.start()
            replica.poll(0)  # the workers hear what they are before the rest is imported
            imported = now()
            from coldframe.runtime.batch.batch import Batch
            from coldframe.runtime.batch.report import Startup, document
            from coldframe.runtime.gateway.card import read_card

            recorder.add("imports", imported)
            replica.run_until(lambda: replica.known)
            card = read_card(
                replica.model.directory,
                args.model_name or model_name(args.model),
                replica.spec.context_length,
                replica.spec.vocab_size,
                args.chat_template,
                vllm=replica.options.vllm is not None,
            )
            startup = Startup(recorder, self._exec_ns)
            batch = Batch(
                *(replica, card, renderer.render, intake, answers, self._tally, args.concurrency)
            )
            self._follow(replica, batch, startup)
            interrupted = None if self._stop.number is None else signal.Signals(self._stop.number)
            told = document(
                *(self._tally, self._seconds(), startup, replica),
                None if interrupted is None else interrupted.name,
            )
            if args.timeline and startup.timeline is not None:
                from coldframe.runtime.timeline.export import write

                write(startup.timeline, args.timeline)
            self._finish(told, replica)

    def _follow(self, replica: Replica, batch: Batch, startup: Startup) -> None:
        """Answers all lines, with a picture of it on a terminal."""
        from coldframe.runtime.batch.report import Progress
        from coldframe.runtime.commands.progress import ProgressBar

        nothing = io.StringIO()
        bar = ProgressBar(nothing if self._silent else None)
        progress = Progress(self._tally, nothing if self._silent else None)

        def on_step() -> None:
            startup.look(replica, batch.first_token_ns)
            if batch.first_token_ns is None:
                bar.update(replica.board)
            else:
                self._stop.gentle = True  # before that there is nothing that could be finished
                bar.clear()
                progress.update(batch.running, batch.tokens)

        try:
            batch.follow(lambda: self._stop.left(self._args.drain), on_step)
        finally:
            self._stop.gentle = False
            bar.clear()
            progress.clear()
        startup.look(replica, batch.first_token_ns, end=True)

    def _finish(self, told: dict[str, Any], replica: Replica | None = None) -> None:
        """Says what it came to, and does what may wait until all is answered."""
        from coldframe.runtime.batch.report import summary

        args = self._args
        if not self._silent:
            print(summary(told, args.output), file=sys.stderr)
        try:
            if replica is not None and told["interrupted"] is None and told["ttft_s"] is not None:
                _for_next_time(replica, told)
        finally:
            # Also where a signal ends us now.
            if args.json:
                print(json.dumps(told), flush=True)

    def _seconds(self) -> float:
        return (now() - self._exec_ns) / 1e9


def _for_next_time(replica: Replica, told: dict[str, Any]) -> None:
    """Keeps what makes the next start faster; nothing of this may spoil what has been answered."""
    from coldframe.runtime.frozen.creating import image_for_next_time

    if replica.options.cache is not None:
        try:
            replica.run_until(lambda: "kept" in replica.facts)
            told["not_cached"] = replica.facts["kept_why_not"]
        except ColdframeError as error:
            told["not_cached"] = str(error)
    if told["snapshot"] is not None:
        told["snapshot"] |= image_for_next_time(replica)


def _dismiss(args: argparse.Namespace) -> None:
    """Ends the processes that were started early, and nobody needs."""
    if args.restorer is not None:
        args.restorer.close()
    # The end of its socket tells the memory service to go, and to clear up after itself.
    args.memory.socket.close()
    args.memory.child.wait()
