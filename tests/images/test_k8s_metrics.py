"""What autoscalers go by: metrics that each pod has, and tells without a key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.images.k8s import FOLDER, OVERLAYS, built, ours, pods
from tests.runtime.serving import served
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]

GUIDE = FOLDER.parents[1] / "docs" / "kubernetes.md"
KEY = "a-key-that-clients-show"


class Asked(NamedTuple):
    """A metric that an autoscaler asks pods for.

    Args:
        command: What the pods run.
        name: The metric's.
        labels: Which of its samples.
    """

    command: str
    name: str
    labels: dict[str, str]

    def found(self, families: dict[str, Metric]) -> bool:
        return self.name in families and any(
            sample.name == self.name and self.labels.items() <= sample.labels.items()
            for sample in families[self.name].samples
        )


def asked() -> Iterator[Asked]:
    """All that autoscalers of ours ask."""
    for overlay in OVERLAYS:
        documents = built(overlay)
        for document in documents:
            if document["kind"] != "HorizontalPodAutoscaler":
                continue
            target = document["spec"]["scaleTargetRef"]["name"]
            (pod,) = [pod for pod in pods(documents) if pod.name == target]
            (container,) = ours(pod)
            for entry in document["spec"]["metrics"]:
                assert entry["type"] == "Pods"
                metric = entry["pods"]["metric"]
                labels = metric.get("selector", {}).get("matchLabels", {})
                yield Asked(container["args"][0], metric["name"], labels)


def families(url: str) -> dict[str, Metric]:
    """What `/metrics` tells whoever shows no key."""
    answer = httpx.get(f"{url}/metrics", timeout=30)
    assert answer.status_code == 200
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def test_fronts_tell_them_before_anybody_has_asked_anything(demo_model: Make) -> None:
    wanted = [metric for metric in asked() if metric.command == "serve"]
    assert len(wanted) == 3
    # As components/api-keys has it, with what the overlays with autoscalers say.
    with served(demo_model(), "--open-metrics", COLDFRAME_API_KEYS=KEY) as server:
        eventually(lambda: all(metric.found(families(server.url)) for metric in wanted))
        told = families(server.url)
        assert {told[metric.name].type for metric in wanted} == {"gauge"}
        assert not Asked("serve", "coldframe_requests_waiting", {}).found(told)
        assert not Asked("serve", "coldframe_kv_blocks", {"state": "busy"}).found(told)


def test_decode_workers_tell_them(demo_model: Make) -> None:
    wanted = [metric for metric in asked() if metric.command == "worker"]
    assert len(wanted) == 1
    flags = ("--role", "decode", "--listen", "127.0.0.1:0")
    secret = "the secret of these two hosts"
    with served(demo_model(), *flags, verb="worker", COLDFRAME_KV_SECRET=secret) as worker:
        eventually(lambda: _http_port(worker.log) is not None, seconds=60)
        url = f"http://127.0.0.1:{_http_port(worker.log)}"
        eventually(lambda: all(metric.found(families(url)) for metric in wanted), seconds=60)


def _http_port(log: str) -> int | None:
    found = re.search(r'"listening", "address": "127\.0\.0\.1 port (\d+)"', log)
    return int(found[1]) if found else None


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_is_scaled_by_our_metrics_shows_them_without_a_key(overlay: str) -> None:
    documents = built(overlay)
    scaled = {
        document["spec"]["scaleTargetRef"]["name"]
        for document in documents
        if document["kind"] == "HorizontalPodAutoscaler"
    }
    for pod in pods(documents):
        for container in ours(pod):
            # Decode workers have no keys: nobody but fronts and Prometheus reaches them.
            open_to_all = pod.name in scaled and container["args"][0] == "serve"
            assert ("--open-metrics" in container["args"]) is open_to_all


def rules() -> dict[str, Any]:
    """What the guide tells an adapter."""
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "seriesQuery" in block]
    return dict(yaml.safe_load(found))


def test_the_guides_adapter_brings_each_of_them() -> None:
    (rule,) = rules()["rules"]
    pattern = re.search(r'__name__=~"(.*?)"', rule["seriesQuery"])
    assert pattern is not None
    for metric in asked():
        assert re.fullmatch(pattern[1], metric.name), metric
        assert re.fullmatch(rule["name"]["matches"], metric.name)
    # Several samples of a pod, of other models or states, are one number for it.
    assert rule["metricsQuery"].startswith("sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)")
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_guide_names_no_metric_that_there_is_not() -> None:
    from docs.generate.metrics import families as all_families

    known = {family.name for family in all_families()}
    named = set(re.findall(r"coldframe_[a-z_]+[a-z]", GUIDE.read_text()))
    assert named
    assert {name for name in named if name.removesuffix("_total") not in known} == set()
