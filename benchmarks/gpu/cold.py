"""A cold container: nothing up, weights on disk or in the page cache, the clock from the exec on.

Each start is a `coldframe run` of its own with fresh workers, and is told by its timeline: when the
last weight was in, when the worker was ready but for the weights, and what the first token was
waiting for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.copies import BARE
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import PROMPT
from coldframe.benchmarks.gpu.report import Check, LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row, cold_start, evict_files, warm_page_cache
from coldframe.loader.errors import PlatformError

__all__ = ["measure", "rows", "same_answers", "split", "start", "worker_ready_s"]

_START_S = 60.0
"""How long a start may take: less than the part that it is in."""
_TOKENS = 8
_WARM, _COLD = 3, 1
_BEYOND_S = 0.3
_SHARES = 6


def measure(report: Report, setting: Setting) -> None:
    """Starts the model from the page cache and from disk."""
    model = Path(report.earlier.need(MODEL))
    warm_page_cache(model)
    warm = [start(model, setting) for _ in range(_WARM)]
    _report(report, "page cache warm", warm)
    cold: list[dict[str, Any]] = []
    try:
        for _ in range(_COLD):
            evict_files(sorted(model.glob("*.safetensors")))
            cold.append(start(model, setting))
    except PlatformError as error:
        report.left_out("page cache cold", str(error))
    else:
        _report(report, "page cache cold", cold)
    report.check(same_answers([*warm, *cold]))


def start(
    model: Path, setting: Setting, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """One start on the GPU, and nowhere else: its document.

    Args:
        model: The checkpoint's directory.
        setting: The GPU.
        environment: As for `cold_start`.

    Raises:
        PlatformError: It failed, or went to the CPU.
    """
    started = dict(
        cold_start(
            *(model, "--device", setting.device),
            prompt_ids=PROMPT,
            tokens=_TOKENS,
            environment=environment,
            limit_s=_START_S,
        )
    )
    if started["device"] != setting.device:
        raise PlatformError(
            "a cold start went to another device",
            expected=setting.device,
            got=f"{started['device']}: {started['device_why']}",
        )
    return started


def _report(report: Report, which: str, starts: Sequence[dict[str, Any]]) -> None:
    try:
        bare: float | None = report.earlier.median(BARE) * 1e9
    except LeftOut as error:
        bare = None
        report.left_out(f"{which}: TTFT / (bytes / bare rate)", str(error))
    for row in rows(which, starts, bare):
        report.figure(row)
    report.answer(f"{which}: what the first token waited for", split(starts[-1]))


def same_answers(starts: Sequence[dict[str, Any]]) -> Check:
    """Whether all starts of one model have answered the same, wherever its bytes came from."""
    name, answers = "every cold start answers the same", [start["token_ids"] for start in starts]
    for answer in answers:
        if answer != answers[0]:
            return Check(name, "failed", f"{answers[0]} first, then {answer}")
    return Check(name, "passed")


def rows(which: str, starts: Sequence[dict[str, Any]], bare: float | None) -> list[Row]:
    """The figures of some cold starts.

    Args:
        which: What they have in common.
        starts: Their documents.
        bare: The link's own rate in bytes per second, if that is known.
    """
    ttft = [start["ttft_s"] for start in starts]
    load = [start["load_s"] for start in starts]
    worker = [worker_ready_s(start) for start in starts]
    beyond = [t - max(a, b) for t, a, b in zip(ttft, load, worker, strict=True)]
    rates = [start["weights_bytes"] / 1e9 / _reading_s(start) for start in starts]
    found = [
        Row(f"{which}: TTFT", ttft, "s"),
        Row(f"  {which}: first byte asked for", [s["first_byte_s"] for s in starts], "s"),
        Row(f"  {which}: last stage in", load, "s"),
        Row(f"  {which}: weights read and copied, from the first byte on", rates, "GB/s"),
        Row(f"  {which}: worker up, but for the weights", worker, "s"),
        Row(f"{which}: TTFT - the later of these two", beyond, "s", _BEYOND_S),
    ]
    if bare is not None:
        least = [start["weights_bytes"] / bare for start in starts]
        ratios = [a / b for a, b in zip(ttft, least, strict=True)]
        found.append(Row(f"  {which}: bytes / bare rate", least, "s"))
        found.append(Row(f"{which}: TTFT / (bytes / bare rate)", ratios, "ratio"))
    return found


def worker_ready_s(start: dict[str, Any]) -> float:
    """When the prefill worker had everything but the weights, in seconds from the exec.

    Raises:
        PlatformError: It does not say so.
    """
    for span in start["stages"]:
        if span["name"] == "ready" and span["process"].startswith("prefill"):
            return float(span["end_s"])
    raise PlatformError("a start's timeline does not say when its worker was ready")


def _reading_s(start: dict[str, Any]) -> float:
    """From the first byte asked for to the last stage."""
    return float(start["load_s"] - start["first_byte_s"])


def split(start: dict[str, Any]) -> dict[str, str]:
    """The largest shares of a start's critical path."""
    shares: dict[str, float] = {}
    for span in start["critical_path"]:
        name = f"{span['process']} {span['name'].partition('[')[0]}".strip()
        shares[name] = shares.get(name, 0.0) + span["end_s"] - span["start_s"]
    largest = sorted(shares, key=lambda name: -shares[name])[:_SHARES]
    return {name: f"{shares[name]:.3f} s" for name in largest}
