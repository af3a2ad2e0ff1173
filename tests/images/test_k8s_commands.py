"""What the manifests tell `coldframe`: flags and variables that it has, times that fit."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.cli import COMMANDS
from coldframe.runtime.commands.run import replica_options
from coldframe.runtime.endpoint.served import named_models
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.serve import settings_for
from coldframe.runtime.gateway.platforms.table import Profile, by_name, detect
from tests.images.k8s import COMBINED, OVERLAYS, Pod, built, environment, one, ours, pods

SETS = [*((name,) for name in OVERLAYS), *COMBINED]
ROOT = Path(__file__).parents[2]
IN_A_CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
ENTRYPOINT = ["/usr/bin/tini", "-s", "--", "/opt/coldframe/bin/coldframe"]
_SLACK_S = 2.0
"""What the front takes for its end behind the last request."""


def label(names: tuple[str, ...]) -> str:
    return "+".join(name.removeprefix("components/") for name in names)


class Told:
    """A container as `coldframe` sees it: its arguments, parsed, and its environment."""

    def __init__(self, pod: Pod, container: dict[str, Any]) -> None:
        self.pod = pod
        self.container = container
        # The image's entry point, said again only where an operator puts a shell in its place.
        assert container.get("command", ENTRYPOINT) == ENTRYPOINT
        self.name, *self.arguments = container["args"]
        self.environ = {**IN_A_CLUSTER, **environment(container)}
        if pod.kind == "Service":
            (port,) = container["ports"]
            self.environ |= {"K_SERVICE": "coldframe", "PORT": str(port["containerPort"])}

    def parse(self, patch: pytest.MonkeyPatch) -> argparse.Namespace:
        """Parses its arguments as its process would."""
        for name in list(os.environ):
            if name.startswith("COLDFRAME_"):
                patch.delenv(name)
        for name, value in self.environ.items():
            patch.setenv(name, value)
        return self.parser().parse(self.arguments)

    def parser(self) -> Parser:
        module = importlib.import_module(COMMANDS[self.name][0])
        parser = Parser(prog=f"coldframe {self.name}")
        module.add_arguments(parser)
        return parser

    def platform(self) -> Profile:
        mounted = {mount["mountPath"] for mount in self.container["volumeMounts"]}
        return detect(self.environ, self.arguments, mounted.__contains__)


def told(*names: str) -> list[Told]:
    found = [Told(pod, container) for pod in pods(built(*names)) for container in ours(pod)]
    assert found
    return found


def grace_s(pod: Pod) -> float:
    """How long Kubernetes waits between preStop's begin and SIGKILL."""
    # Knative grants what a request may take.
    name = "timeoutSeconds" if pod.kind == "Service" else "terminationGracePeriodSeconds"
    return float(pod.spec[name])


@pytest.mark.parametrize("names", SETS, ids=label)
def test_flags_are_ours(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for container in told(*names):
        assert container.name in COMMANDS
        with monkeypatch.context() as patch:
            container.parse(patch)


def test_a_flag_that_there_is_not_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = told("deployment")
    container.arguments.append("--snapshot-stores=/x")
    with pytest.raises(SystemExit):
        container.parse(monkeypatch)


def _read_somewhere() -> set[str]:
    """Variables that our code names."""
    found: set[str] = set()
    for folder in ("loader", "snapshot", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r'"(COLDFRAME_[A-Z_0-9]+)"', path.read_text()))
    return found


@pytest.mark.parametrize("names", SETS, ids=label)
def test_variables_are_ours(names: tuple[str, ...]) -> None:
    known = _read_somewhere()
    for container in told(*names):
        twins = {twin for _, twin in container.parser()._twins}
        given = {entry["name"] for entry in container.container["env"]}
        assert {name for name in given if name.startswith("COLDFRAME_")} <= known | twins
        # Files are written where they can be.
        mounts = {mount["mountPath"]: mount for mount in container.container["volumeMounts"]}
        for name in ("HOME", "XDG_CACHE_HOME"):
            assert not mounts[container.environ[name]].get("readOnly")
        assert not mounts["/tmp"].get("readOnly")


def test_all_of_a_pods_own_variables_are_looked_at() -> None:
    assert "COLDFRAME_MODEL" in _read_somewhere()
    assert "COLDFRAME_MODELS" not in _read_somewhere()


@pytest.mark.parametrize("names", SETS, ids=label)
def test_servers_listen_where_they_are_asked_and_end_in_time(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for container in told(*names):
        with monkeypatch.context() as patch:
            args = container.parse(patch)
        profile = container.platform()
        assert profile.name == ("knative" if container.pod.kind == "Service" else "kubernetes")
        port = int(args.port) if args.port else profile.port(container.environ)
        ports = {entry.get("name"): entry for entry in container.container["ports"]}
        http = ports[None if container.pod.kind == "Service" else "http"]
        assert port == http["containerPort"]
        models = named_models(args, profile, container.environ)
        assert len(models) == 1
        settings = settings_for(args, profile, tuple(models))
        stop = container.container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        assert (
            settings.drain_s + stop["sleep"]["seconds"] + _SLACK_S
            <= grace_s(container.pod)
            <= settings.drain_s + stop["sleep"]["seconds"] + 30
        )


@pytest.mark.parametrize("names", SETS, ids=label)
def test_what_else_listens_is_a_port_of_the_pods(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for container in told(*names):
        with monkeypatch.context() as patch:
            args = container.parse(patch)
        ports = {
            entry["name"]: entry["containerPort"]
            for entry in container.container["ports"]
            if "name" in entry
        }
        listens = {"requests": "listen", "kv": "kv_listen", "peers": "serve_peers"}
        found = {name: getattr(args, flag, None) for name, flag in listens.items()}
        assert {name: place for name, place in found.items() if place} == {
            name: f"0.0.0.0:{ports[name]}" for name in listens if name in ports
        }


@pytest.mark.parametrize(
    ("overlay", "name"),
    [("scale-out", "coldframe-peers"), ("dynamo", "coldframe-worker-peers")],
)
def test_peers_are_looked_for_where_they_are(
    overlay: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = one(built(overlay), "Service", name)["spec"]
    (port,) = service["ports"]
    # All addresses, those of replicas that still load among them.
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    for container in told(overlay):
        with monkeypatch.context() as patch:
            args = container.parse(patch)
        assert args.peers_from == [f"dns://{name}:{port['port']}"]
        assert args.serve_peers.rpartition(":")[2] == str(port["port"])
        assert service["selector"].items() <= container.pod.labels.items()
        (token,) = [e for e in container.container["env"] if e["name"] == "COLDFRAME_PEER_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "coldframe-peers", "key": "token"}


def test_dynamos_router_has_workers_to_choose_from() -> None:
    parts = one(built("dynamo"), "DynamoGraphDeployment")["spec"]["components"]
    assert {part["type"]: part["replicas"] for part in parts} == {
        "frontend": 1,
        "prefill": 2,
        "decode": 2,
    }


@pytest.mark.parametrize(
    "names", [names for names in SETS if names[0] == "prefill-decode"], ids=label
)
def test_decode_workers_are_found_by_their_service(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = built(*names)
    front = next(container for container in told(*names) if container.name == "serve")
    args = front.parse(monkeypatch)
    service = one(documents, "Service", "coldframe-decode")
    (port,) = service["spec"]["ports"]
    # All addresses of those that can decode, whatever they are called.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is False
    assert args.decode.split(",")[0] == f"dns://coldframe-decode:{port['port']}"
    workers = one(documents, "Deployment", "coldframe-decode")["spec"]["template"]
    assert service["spec"]["selector"] == workers["metadata"]["labels"]


@pytest.mark.parametrize(
    "names", [names for names in SETS if names[0] == "prefill-decode"], ids=label
)
def test_prefill_and_decode_are_scaled_by_what_our_own_scaler_goes_by(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = built(*names)
    shares = {
        "coldframe": ("coldframe_prefill_tokens_waiting", None, "prefill_share"),
        "coldframe-decode": ("coldframe_kv_blocks", {"state": "used"}, "decode_share"),
    }
    for container in told(*names):
        with monkeypatch.context() as patch:
            args = container.parse(patch)
        metric, labels, flag = shares.pop(container.pod.name)
        scaler = one(documents, "HorizontalPodAutoscaler", container.pod.name)["spec"]
        by, *more = scaler["metrics"]
        # Before a front's prompts are counted they wait for --max-running.
        front = container.pod.name == "coldframe"
        names_of_more = [one_more["pods"]["metric"]["name"] for one_more in more]
        assert names_of_more == (["coldframe_num_requests_waiting"] if front else [])
        chosen = {} if labels is None else {"selector": {"matchLabels": labels}}
        assert by["pods"]["metric"] == {"name": metric, **chosen}
        assert by["pods"]["target"]["averageValue"] == str(getattr(args, flag))
    assert not shares


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_replicas_can_be_made_of_it(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for container in told(overlay):
        with monkeypatch.context() as patch:
            patch.setenv("COLDFRAME_DEVICE", "cpu")
            args = container.parse(patch)
            args.model = next(iter(named_models(args, container.platform(), container.environ)))
            assert replica_options(args).snapshot.mode == "auto"


def test_who_waits_in_front_waits_as_long_as_a_request_may() -> None:
    (container,) = told("knative")
    with pytest.MonkeyPatch.context() as patch:
        args = container.parse(patch)
    settings = settings_for(args, by_name("knative"), ("m",))
    spec = container.pod.spec
    assert settings.max_wait_s <= spec["responseStartTimeoutSeconds"] <= spec["timeoutSeconds"]
    assert spec["containerConcurrency"] == settings.max_running
    (container,) = told("keda-http")
    with pytest.MonkeyPatch.context() as patch:
        args = container.parse(patch)
    settings = settings_for(args, by_name("kubernetes"), ("m",))
    scaled = one(built("keda-http"), "HTTPScaledObject")["spec"]
    assert float(scaled["timeouts"]["responseHeader"].rstrip("s")) > settings.max_wait_s
    assert scaled["scalingMetric"]["concurrency"]["targetValue"] < settings.max_running


def test_the_entry_point_is_that_of_the_images() -> None:
    for name in ("cpu", "cuda", "vllm"):
        words = dict(
            line.split(" ", 1)
            for line in (ROOT / "images" / f"{name}.Dockerfile").read_text().splitlines()
            if line.startswith(("ENTRYPOINT ", "USER "))
        )
        assert json.loads(words["ENTRYPOINT"]) == ENTRYPOINT
        assert words["USER"] == "65532:65532"
