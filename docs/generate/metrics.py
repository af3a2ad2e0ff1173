"""The metrics at `/metrics`: what the gateway renders when all that can be told is there."""

from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from coldframe.runtime.endpoint.frontstats import FrontStats
from coldframe.runtime.gateway.metrics import Metrics
from docs.generate.markdown import cell, code, table

__all__ = ["families", "metrics"]

_ANY = "..."
"""A label's value that could be any other: a model's name, say."""
_TOLD = FrontStats(
    stages={_ANY: 1.0},
    critical={_ANY: 1.0},
    device_s={_ANY: {"used": 1.0, "idle": 1.0}},
    workers={_ANY: {"starting": 0, "up": 1, "leaving": 0}},
    memory={_ANY: {"anon": 1, "shmem": 1, "file": 1}},
)


def families() -> list[Metric]:
    """All families, each with a sample for every value that a label of it always has."""
    counted = Metrics()
    counted.begin(_ANY).end("stop")
    counted.answered(_ANY, _ANY, 200)
    text, _ = counted.render({_ANY: _TOLD})
    return list(text_string_to_metric_families(text.decode()))


def metrics() -> str:
    """A table of them."""
    return table(["metric", "type", "labels", ""], sorted(map(_row, families())))


def _row(family: Metric) -> list[str]:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in values.setdefault(label, []):
                values[label].append(value)
    labels = [_label(label, found) for label, found in values.items()]
    # The exposition's text has `_total` behind the names of counters, the parsed family has not.
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return [code(name), family.type, ", ".join(labels), cell(family.documentation)]


def _label(label: str, values: list[str]) -> str:
    fixed = [value for value in values if value != _ANY and not value.isdigit()]
    return code(label) + (f" ({', '.join(map(cell, fixed))})" if fixed else "")
