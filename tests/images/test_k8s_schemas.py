"""Every object of images/k8s is what its schema says: Kubernetes' own, or that of its CRD."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.images.k8s import COMBINED, FOLDER, OVERLAYS, Document, build, built, one
from tests.images.schemas import OLDEST, Schema, check, crd_schemas, kubernetes_types


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_are_what_their_schemas_say(overlay: str) -> None:
    documents = built(overlay)
    assert documents
    for document in documents:
        check(document)


@pytest.mark.parametrize("names", COMBINED, ids=lambda names: names[0])
def test_so_they_are_with_every_component(names: tuple[str, ...]) -> None:
    for document in built(*names):
        check(document)


def test_all_of_it_is_in_the_oldest_kubernetes_that_the_guide_names_and_in_none_before() -> None:
    sets = [*((overlay,) for overlay in OVERLAYS), *COMBINED]
    documents = [document for names in sets for document in built(*names)]
    for text in dict.fromkeys(json.dumps(document, sort_keys=True) for document in documents):
        check(json.loads(text), OLDEST)
    deployment = one(built("deployment-snapshots"), "Deployment")
    major, minor = OLDEST.split(".")
    with pytest.raises(kubernetes_validate.ValidationError, match="appArmorProfile"):
        check(deployment, f"{major}.{int(minor) - 1}")
    guide = (FOLDER.parents[1] / "docs" / "kubernetes.md").read_text()
    assert f"Kubernetes {OLDEST} or newer" in guide


def test_the_guides_own_overlay_is_one(tmp_path: Path) -> None:
    guide = (FOLDER.parents[1] / "docs" / "kubernetes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    (text,) = [block for block in blocks if "kind: Kustomization" in block]
    here = os.path.relpath(FOLDER, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(text.replace("coldframe/images/k8s", here))
    (documents,) = build([tmp_path])
    for document in documents:
        check(document)
        assert document["metadata"]["namespace"] == "models"
    (container,) = one(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.internal/coldframe@sha256:")
    assert container["args"][-1] == "--model-name=llama"


def test_every_file_is_part_of_something() -> None:
    named = set()
    for path in FOLDER.rglob("kustomization.yaml"):
        said = yaml.safe_load(path.read_text())
        named.add(path)
        files = [*said.get("resources", ()), *(patch["path"] for patch in said.get("patches", ()))]
        named |= {(path.parent / name).resolve() for name in files}
    assert {path.resolve() for path in FOLDER.rglob("*.yaml")} <= named


def _broken(overlay: str, kind: str, *path: Any, value: Any) -> Document:
    """An object with something else at one place."""
    document = copy.deepcopy(one(built(overlay), kind))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return document


_POD = ("spec", "template", "spec")
_GRAPH = ("dynamo", "DynamoGraphDeployment")
_PART = ("spec", "components", 1)


@pytest.mark.parametrize(
    ("overlay", "kind", "path", "value"),
    [
        ("deployment", "Deployment", (*_POD, "hostUser"), False),
        ("deployment", "Deployment", (*_POD, "containers", 0, "readinessProbe", "path"), "/x"),
        ("deployment", "Deployment", (*_POD, "terminationGracePeriodSeconds"), "135s"),
        ("knative", "Service", (*_POD, "terminationGracePeriodSeconds"), 300),
        ("knative", "Service", (*_POD, "containers", 0, "lifecycle"), {}),
        ("knative", "Service", (*_POD, "containers", 0, "ports"), {}),
        ("keda-http", "HTTPScaledObject", ("spec", "host"), "a.example"),
        ("keda-http", "HTTPScaledObject", ("spec", "replicas", "min"), "0"),
        (*_GRAPH, (*_PART, "replica"), 1),
        (*_GRAPH, (*_PART, "type"), "prefil"),
        (*_GRAPH, (*_PART, "podTemplate", "spec", "container"), []),
        (*_GRAPH, (*_PART, "podTemplate", "metadata", "uid"), "1"),
        (*_GRAPH, ("spec", "env", 0, "valuefrom"), {}),
        (*_GRAPH, ("spec", "providerOverride"), {"value": {}}),
        (*_GRAPH, ("spec", "topologyConstraint"), {"packDomain": "zone"}),
        (*_GRAPH, ("spec", "experimental"), {"kvTransferPolicies": {}}),
        (*_GRAPH, ("spec", "experimental"), {"componentGroups": [{"name": "a", "replicas": 0}]}),
        (*_GRAPH, (*_PART, "experimental"), {"failover": {"numShadows": 2}}),
        (*_GRAPH, (*_PART, "experimental"), {"checkpoint": {"enabled": True, "mode": "auto"}}),
        (*_GRAPH, (*_PART, "eppConfig"), {"configMapRef": {"name": "no-key"}}),
        (*_GRAPH, (*_PART, "multinode"), {"nodeCount": 1}),
    ],
)
def test_a_wrong_field_is_found(overlay: str, kind: str, path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(_broken(overlay, kind, *path, value=value))


def _places(schema: Schema, place: str = "") -> Iterator[tuple[str, Schema]]:
    """All that a schema describes."""
    yield place, schema
    for name, part in schema.get("properties", {}).items():
        yield from _places(part, f"{place}.{name}".lstrip("."))
    if "items" in schema:
        yield from _places(schema["items"], f"{place}[]")


def test_what_dynamos_definition_leaves_open_is_open_there_or_one_of_kubernetes_types() -> None:
    (graph,) = [schema for _, kind, schema in crd_schemas() if kind == "DynamoGraphDeployment"]
    places = dict(_places(graph))
    part, node = "spec.components[]", "spec.components[].multinode"
    services = f"{part}.experimental"
    assert {
        place: schema["x-coldframe-type"]
        for place, schema in places.items()
        if "x-coldframe-type" in schema
    } == {
        f"{part}.podTemplate.spec": "io.k8s.api.core.v1.PodSpec",
        "spec.env[]": "io.k8s.api.core.v1.EnvVar",
    }
    assert {
        place
        for place, schema in places.items()
        if schema.get("x-kubernetes-preserve-unknown-fields")
    } == {
        f"{part}.eppConfig.config",
        f"{part}.eppConfig.config.plugins[].parameters",
        f"{services}.checkpoint.job.podTemplate",
        f"{services}.gpuMemoryService.extraClientPods[].podTemplate",
        "spec.providerOverride.value",
        f"{part}.providerOverride.value",
        f"{node}.leader.providerOverride.value",
        f"{node}.worker.providerOverride.value",
    }
    for place, schema in places.items():
        if schema.get("type") == "object" and place not in ("", "metadata"):
            known = {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"}
            assert known & set(schema), place


def test_kubernetes_types_are_looked_into() -> None:
    known = kubernetes_types()
    for _, _, schema in crd_schemas():
        for _, part in _places(schema):
            assert part.get("x-coldframe-type", "io.k8s.api.core.v1.Pod") in known
    graph = copy.deepcopy(one(built("dynamo"), "DynamoGraphDeployment"))
    graph["spec"]["components"][1]["podTemplate"]["spec"]["containers"][0]["ports"] = "http"
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'array'"):
        check(graph)
