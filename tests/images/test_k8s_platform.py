"""What a cluster does to pods: nodes are emptied, disks fill, processes hang, rollouts wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.images.k8s import (
    COMBINED,
    FOLDER,
    IMAGE,
    OVERLAYS,
    Document,
    Pod,
    build,
    built,
    ours,
    pods,
)

SETS = [*((name,) for name in OVERLAYS), *COMBINED]
_MAY_BE_REACHED = {"http", "system"}
"""Ports for everybody: the API and its metrics, and Dynamo's metrics."""


def label(names: tuple[str, ...]) -> str:
    return "+".join(name.removeprefix("components/") for name in names)


def in_a_deployment(*names: str) -> list[Pod]:
    """Pods of ours that Knative does not care for."""
    return [pod for pod in pods(built(*names)) if pod.kind != "Service" and list(ours(pod))]


def selecting(documents: tuple[Document, ...], kind: str, pod: Pod) -> list[dict[str, Any]]:
    """The specs of one kind that mean a pod."""
    selector = {"NetworkPolicy": "podSelector", "PodDisruptionBudget": "selector"}[kind]
    return [
        document["spec"]
        for document in documents
        if document["kind"] == kind
        and document["spec"][selector]["matchLabels"].items() <= pod.labels.items()
    ]


@pytest.mark.parametrize("names", SETS, ids=label)
def test_nodes_are_emptied_one_replica_at_a_time(names: tuple[str, ...]) -> None:
    for pod in in_a_deployment(*names):
        (budget,) = selecting(built(*names), "PodDisruptionBudget", pod)
        # One that still loads, or never will, is in nobody's way.
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert budget["maxUnavailable"] == 1


@pytest.mark.parametrize("names", SETS, ids=label)
def test_replicas_are_on_nodes_and_in_zones_of_their_own_where_there_are_any(
    names: tuple[str, ...],
) -> None:
    for pod in in_a_deployment(*names):
        found = pod.spec["topologySpreadConstraints"]
        places = [constraint["topologyKey"] for constraint in found]
        assert places == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        for constraint in found:
            assert constraint["labelSelector"]["matchLabels"].items() <= pod.labels.items()
            # And where there are none a pod is better there than nowhere.
            assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"


@pytest.mark.parametrize("names", SETS, ids=label)
def test_who_hangs_is_not_waited_for_and_who_ends_is(names: tuple[str, ...]) -> None:
    for pod in in_a_deployment(*names):
        for container in ours(pod):
            stop = container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
            for name in ("startupProbe", "livenessProbe"):
                grace = container[name]["terminationGracePeriodSeconds"]
                assert stop["sleep"]["seconds"] + 5 <= grace <= 30
                assert grace < pod.spec["terminationGracePeriodSeconds"]
            # Kubernetes refuses one for a readiness probe.
            assert "terminationGracePeriodSeconds" not in container["readinessProbe"]


def budget_s(probe: dict[str, Any]) -> int:
    """How long a probe may fail until something is done."""
    return int(probe["periodSeconds"]) * int(probe["failureThreshold"])


@pytest.mark.parametrize("names", SETS, ids=label)
def test_probes_wait_for_a_port_and_rollouts_for_a_load(names: tuple[str, ...]) -> None:
    documents = built(*names)
    for pod in in_a_deployment(*names):
        for container in ours(pod):
            # An interpreter that comes over a network as it is read, not weights.
            assert 30 <= budget_s(container["startupProbe"]) <= 120
            # What answers slowly under load is not dead.
            assert budget_s(container["livenessProbe"]) >= 30
            assert container["livenessProbe"]["timeoutSeconds"] >= 5
    for document in documents:
        if document["kind"] == "Deployment":
            assert document["spec"]["progressDeadlineSeconds"] >= 1200
        elif document["apiVersion"].startswith("serving.knative.dev"):
            notes = document["spec"]["template"]["metadata"]["annotations"]
            assert notes["serving.knative.dev/progress-deadline"] == "1200s"


@pytest.mark.parametrize("names", SETS, ids=label)
def test_nothing_fills_a_nodes_disk(names: tuple[str, ...]) -> None:
    for pod in pods(built(*names)):
        for volume in pod.spec.get("volumes", ()):
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"]
        for container in ours(pod):
            assert container["resources"]["requests"]["ephemeral-storage"]


@pytest.mark.parametrize("names", SETS, ids=label)
def test_what_is_not_encrypted_is_among_our_own_pods(names: tuple[str, ...]) -> None:
    documents = built(*names)
    for pod in in_a_deployment(*names):
        (container,) = ours(pod)
        ports = {port["name"] for port in container["ports"]}
        policies = selecting(documents, "NetworkPolicy", pod)
        assert policies
        assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
        for rule in [rule for policy in policies for rule in policy["ingress"]]:
            reached = {port["port"] for port in rule["ports"]} if "ports" in rule else ports
            if reached <= _MAY_BE_REACHED:
                continue
            (peer,) = rule["from"]  # in this namespace, and ours
            assert set(peer) == {"podSelector"}
            wanted = peer["podSelector"]["matchLabels"].items()
            assert any(wanted <= other.labels.items() for other in pods(documents))


def test_under_dynamo_nothing_goes_by_labels_that_grove_writes() -> None:
    # It puts `app.kubernetes.io/name` and others of its own on the pods that it makes.
    documents = built("dynamo")
    selectors = [
        document["spec"].get("podSelector", document["spec"].get("selector"))
        for document in documents
        if document["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "Service")
    ]
    keys = {key for found in selectors for key in found.get("matchLabels", found)}
    for policy in [document for document in documents if document["kind"] == "NetworkPolicy"]:
        for rule in policy["spec"]["ingress"]:
            for peer in rule.get("from", ()):
                keys |= set(peer["podSelector"]["matchLabels"])
    for pod in pods(documents):
        for constraint in pod.spec.get("topologySpreadConstraints", ()):
            keys |= set(constraint["labelSelector"]["matchLabels"])
    assert keys == {"coldframe/graph", "coldframe/part", "coldframe/worker"}


def test_dynamos_front_end_has_as_long_for_its_end_as_workers() -> None:
    (front,) = [pod for pod in pods(built("dynamo")) if pod.name == "coldframe/Frontend"]
    (container,) = front.containers
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 5
    workers = {pod.spec["terminationGracePeriodSeconds"] for pod in in_a_deployment("dynamo")}
    assert workers == {front.spec["terminationGracePeriodSeconds"]}


@pytest.mark.parametrize("names", SETS, ids=label)
def test_a_node_with_a_gpu_is_where_a_pod_with_one_may_be(names: tuple[str, ...]) -> None:
    with_gpu = "components/gpu" in names
    for pod in in_a_deployment(*names):
        assert bool(pod.spec.get("tolerations")) is with_gpu
        for container in ours(pod):
            assert ("nvidia.com/gpu" in container["resources"]["limits"]) is with_gpu


def test_an_images_name_reaches_every_container_of_ours(tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    folders = []
    for overlay in OVERLAYS:
        folder = tmp_path / overlay
        folder.mkdir()
        said = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(FOLDER / overlay, folder)],
            "images": [{"name": IMAGE[:-1], "newName": "registry.internal/c", "digest": digest}],
        }
        (folder / "kustomization.yaml").write_text(json.dumps(said))
        folders.append(folder)
    for overlay, documents in zip(OVERLAYS, build(folders), strict=True):
        before = [container for pod in pods(built(overlay)) for container in ours(pod)]
        images = [container["image"] for pod in pods(documents) for container in pod.containers]
        assert images.count(f"registry.internal/c@{digest}") == len(before) > 0, overlay
        assert not [image for image in images if image.startswith(IMAGE)]
        # The node's own will do: a name that moves would be another image on each node.
        for pod in pods(documents):
            assert {container["imagePullPolicy"] for container in pod.containers} == {
                "IfNotPresent"
            }


def test_secrets_are_files_or_single_keys_and_no_configuration_is_a_configmap() -> None:
    for overlay in OVERLAYS:
        documents = built(overlay)
        # What pods are told is in their template: a change of it makes new pods, and no other does.
        assert not [document for document in documents if document["kind"] == "ConfigMap"]
        assert not [document for document in documents if document["kind"] == "Secret"]
        for pod in pods(documents):
            for volume in pod.spec.get("volumes", ()):
                if "secret" in volume:
                    assert volume["secret"]["defaultMode"] == 0o440
