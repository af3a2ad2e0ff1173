"""A plan's document as people read it."""

from __future__ import annotations

from typing import Any

from coldframe.runtime.units import human_bytes, human_seconds

__all__ = ["plan_table"]


def plan_table(document: dict[str, Any]) -> str:
    """The table of one model on one device."""
    lines = [
        f"{document['model']}: {document['family']}, {document['dtype']}, layout "
        f"{document['layout']}, plan {document['plan_hash'][:12]}",
        "",
        f"{'stage':<12}{'bytes':>10}{'reads':>7}{'ready at':>10}",
    ]
    for stage in document["stages"]:
        lines.append(
            f"{stage['name']:<12}{human_bytes(stage['bytes']):>10}{stage['extents']:>7}"
            f"{human_seconds(stage['ready_s']):>10}"
        )
    if document["ranks"]:
        lines += ["", f"{'rank':<12}{'holds':>10}{'bytes':>10}{'reads':>7}"]
    for rank in document["ranks"]:
        lines.append(
            f"{rank['rank']:<12}{human_bytes(rank['weights_bytes']):>10}"
            f"{human_bytes(rank['read_bytes']):>10}{rank['extents']:>7}"
        )
    lines += ["", *_memory(document), "", *_time(document)]
    if "placement" in document:
        lines += ["", *_placement(document["placement"])]
    if document["skipped"]:
        lines.append(f"not loaded: {', '.join(document['skipped'])}")
    return "\n".join(lines)


def _memory(document: dict[str, Any]) -> list[str]:
    memory, device = document["memory"], document["device"]
    if document["gpu"] is not None:
        device = f"{device}, {document['gpu']}"
    lines = [
        f"device {device}" + (f": {document['device_why']}" if document["device_why"] else ""),
        f"memory for {document['batch']} x {document['context']} tokens: "
        f"{human_bytes(memory['total'])} of {human_bytes(memory['available'])} available",
    ]
    for name in ("weights", "kv", "activations", "overhead"):
        source = f"  {memory['overhead_source']}" if name == "overhead" else ""
        lines.append(f"  {name:<12}{human_bytes(memory[name]):>10}{source}")
    lines.append(f"KV that a replica takes by default: {human_bytes(document['kv_default'])}")
    for replica in memory["replica"]:
        if replica["tier"] == "fresh" or replica["through"] == "http":
            lines.append(
                f"all processes after a short answer, {replica['tier']}, {replica['through']}, "
                f"weights {replica['weights']}: {human_bytes(replica['pss'])} of PSS"
            )
    return lines


def _time(document: dict[str, Any]) -> list[str]:
    lines = [f"weights in after {human_seconds(document['predicted_load_s'])} ({_how(document)})"]
    starts = {(s["tier"], s["cache"], s["through"]): s for s in document["starts"]}
    if any(start["ttft_s"] is not None for start in starts.values()):
        columns = [(cache, through) for cache in ("cold", "warm") for through in ("run", "http")]
        lines += [
            "",
            f"first token of {document['prompt_tokens']} after, by the page cache and how it is "
            "asked for:",
            f"{'':<10}" + "".join(f"{f'{c}, {t}':>12}" for c, t in columns),
        ]
        for tier in dict.fromkeys(tier for tier, _, _ in starts):
            cells = [starts[(tier, *column)] for column in columns]
            if all(cell["ttft_s"] is None for cell in cells):
                lines.append(f"{tier:<10}  {cells[-1]['why']}")
                continue
            shown = ("-" if c["ttft_s"] is None else human_seconds(c["ttft_s"]) for c in cells)
            lines.append(f"{tier:<10}" + "".join(f"{text:>12}" for text in shown))
        kept = document["calibration"]
        age = f", {human_seconds(kept['age_s'])} ago" if kept["source"] == "kept" else ""
        lines.append(f"by {kept['rehearsals']} rehearsals of a scale model{age}")
    else:
        whys = dict.fromkeys(s["why"] for (tier, *_), s in starts.items() if tier == "fresh")
        lines += ["", f"no start can be told: {'; '.join(whys)}"]
    lines += [
        "",
        f"a fresh worker up after {human_seconds(document['worker_start_s'])}:",
        f"first token of a short prompt after about {human_seconds(document['predicted_ttft_s'])}",
    ]
    return lines


def _placement(places: list[dict[str, Any]]) -> list[str]:
    width = max(len(place["name"]) for place in places) + 2
    lines = [f"{'where':<{width}}{'fits':<6}{'TTFT':>9}  "]
    for place in places:
        fits = {True: "yes", False: "no", None: "?"}[place["fits"]]
        ttft_s = place["ttft_s"]
        takes = "-" if ttft_s is None else human_seconds(ttft_s)
        why = "; ".join(place["why"])
        lines.append(f"{place['name']:<{width}}{fits:<6}{takes:>9}  {why}")
    return lines


def _how(document: dict[str, Any]) -> str:
    rate = document["rate_bytes_per_s"]
    source = str(document["rate_source"])
    how = source if rate is None else f"{human_bytes(rate)}/s, {source}"
    return how if document["gpu"] is None else f"{how}; the link to the GPU is not in it"
