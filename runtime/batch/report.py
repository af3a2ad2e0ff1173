"""What is told of a batch: how far it is, on a terminal, and in the end what it came to."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from coldframe.loader.timeline import Recorder, now
from coldframe.runtime.batch.intake import Tally
from coldframe.runtime.timeline.timeline import Timeline
from coldframe.runtime.units import human_seconds

if TYPE_CHECKING:
    from coldframe.runtime.replica.replica import Replica

__all__ = ["Progress", "Startup", "document", "summary"]

_SPANS_NS = 1_000_000_000
_EVERY_S = 0.2


class Startup:
    """The cold start of a batch: its timeline, kept as soon as it is whole.

    Every prefill brings spans, and a batch may have millions: later ones are thrown away.

    Args:
        recorder: Has the front's spans.
        exec_ns: When the front's process was created.
    """

    def __init__(self, recorder: Recorder, exec_ns: int) -> None:
        self._recorder = recorder
        self._exec_ns = exec_ns
        self.timeline: Timeline | None = None

    def look(self, replica: Replica, first_token_ns: int | None, *, end: bool = False) -> None:
        """Takes the timeline if it is whole now.

        Args:
            replica: Whose start it is.
            first_token_ns: When the first token was out, where there is one.
            end: Whether nothing more will come.
        """
        if self.timeline is None and (end or self._whole(replica, first_token_ns)):
            if first_token_ns is not None:
                heads = [s.end_ns for s in replica.spans if s.name == "prefill[head]"]
                head = max((end for end in heads if end <= first_token_ns), default=first_token_ns)
                self._recorder.add("first_token", head, first_token_ns)
            spans = [*self._recorder.drain(), *replica.spans]
            self.timeline = Timeline(spans, self._exec_ns, first_token_ns)
        if self.timeline is not None:
            replica.spans.clear()

    def _whole(self, replica: Replica, first_token_ns: int | None) -> bool:
        if first_token_ns is None or not replica.loaded:
            return False
        # The spans of those who made the first token come behind it.
        explained = any(span.name == "prefill[head]" for span in replica.spans)
        return explained or now() - first_token_ns > _SPANS_NS


class Progress:
    """One line on a terminal; nothing of the kind in a pipe.

    Args:
        tally: The counts.
        stream: Where to, standard error by default.
    """

    def __init__(self, tally: Tally, stream: TextIO | None = None) -> None:
        self._tally = tally
        self._stream = sys.stderr if stream is None else stream
        self._active = self._stream.isatty()
        self._drawn_at = 0.0
        self._began: float | None = None
        self._shown = False

    def update(self, running: int, tokens: int) -> None:
        """Says how far it is.

        Args:
            running: Sequences that the replica has.
            tokens: So many have been made.
        """
        moment = time.monotonic()
        if not self._active or moment - self._drawn_at < _EVERY_S:
            return
        self._drawn_at = moment
        self._began = self._began or moment
        rate = tokens / max(moment - self._began, _EVERY_S)
        tally = self._tally
        parts = [f"{tally.answered:,} answered"]
        parts += [f"{tally.refused:,} refused"] if tally.refused else []
        parts += [f"{running} running", f"{tokens:,} tokens", f"{rate:.0f} tokens/s"]
        self._stream.write(f"\r\x1b[2K{', '.join(parts)}")
        self._stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Takes the line away, before something else is written."""
        if self._shown:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._shown = False


def document(
    tally: Tally,
    seconds: float,
    startup: Startup | None = None,
    replica: Replica | None = None,
    interrupted: str | None = None,
) -> dict[str, Any]:
    """What it came to, as JSON values.

    Args:
        tally: The counts.
        seconds: From the exec on.
        startup: The cold start, where there was one.
        replica: Who answered, likewise.
        interrupted: The signal that ended it early.
    """
    counts: dict[str, Any] = {name: getattr(tally, name) for name in tally.__slots__}
    timeline = None if startup is None else startup.timeline
    first = None if timeline is None else timeline.first_token_ns
    since_first = None
    if timeline is not None and first is not None:
        since_first = seconds - timeline.seconds(first)
    counts |= {
        "unanswered": tally.unanswered,
        "interrupted": interrupted,
        "seconds": seconds,
        "tokens_per_second": tally.completion_tokens / since_first if since_first else None,
    }
    if replica is None or timeline is None:
        return {**counts, "loaded": False, "ttft_s": None}
    last_ready = timeline.last_stage_ready_ns()
    snapshot = replica.facts.get("snapshot")
    return {
        **counts,
        "loaded": True,
        "tier": None if snapshot is None else snapshot["tier"],
        "device": replica.facts["device"],
        "device_why": replica.facts["device_why"],
        "load_s": None if last_ready is None else timeline.seconds(last_ready),
        "weights_bytes": replica.facts.get("weights_bytes"),
        "load_mode": replica.facts.get("mode"),
        "load_mode_reason": replica.facts.get("why"),
        "verified": replica.facts.get("verified"),
        "restarted": replica.facts.get("restarted"),
        "snapshot": snapshot,
        **timeline.to_json(),
    }


def summary(told: dict[str, Any], path: str) -> str:
    """The same for people, a few lines without a final newline.

    Args:
        told: From `document`.
        path: The file of the answers.
    """
    lines = [f"{told['answered']:,} of {told['lines']:,} lines answered"]
    if told["refused"]:
        lines.append(f"{told['refused']:,} refused, which {path} explains")
    if told["skipped"]:
        lines.append(f"{told['skipped']:,} had their answer before")
    if told["unanswered"]:
        lines.append(f"{told['unanswered']:,} begun and not answered: start the same batch again")
    if told["ttft_s"] is not None:
        tier = "" if told["tier"] in (None, "fresh") else f", from a snapshot ({told['tier']})"
        lines.append(f"first token after {human_seconds(told['ttft_s'])}{tier}")
    rate = told["tokens_per_second"]
    if rate is not None:
        lines.append(
            f"{told['prompt_tokens']:,} tokens of prompts and {told['completion_tokens']:,} of "
            f"answers, {rate:.1f} tokens/s after the first"
        )
    lines.append(
        f"{human_seconds(told['seconds'])} in all"
        + ("" if told["loaded"] else ", nothing was loaded")
    )
    return "\n".join(lines)
