"""Every object of images/k8s is what its schema says: Kubernetes' own, or that of its CRD."""

from __future__ import annotations

import copy
import functools
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.images.k8s import COMBINED, CRDS, FOLDER, OVERLAYS, Document, build, built, one, pods

VERSION = "1.36"
"""The Kubernetes whose schemas count: the first in which a pod's user namespaces are stable."""

_KNATIVE_ONLY = (
    "containerConcurrency",
    "idleTimeoutSeconds",
    "responseStartTimeoutSeconds",
    "timeoutSeconds",
)
_METADATA = {"name": "test"}


def closed(schema: Any) -> Any:
    """A CRD's schema that takes no field it does not name, as `kubectl apply` does not."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: closed(part) for name, part in value.items()}
        if key == "properties"
        else closed(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@functools.cache
def crd(api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    """What holds a custom resource against its definition; None where it is no custom one."""
    for path in sorted(CRDS.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            if (api_version, kind) == (f"{spec['group']}/{version['name']}", spec["names"]["kind"]):
                schema = closed(version["schema"]["openAPIV3Schema"])
                jsonschema.Draft202012Validator.check_schema(schema)
                return jsonschema.Draft202012Validator(schema)
    return None


def check(document: Document) -> None:
    """Holds an object against its schema, and pods in it against Kubernetes'."""
    validator = crd(document["apiVersion"], document["kind"])
    if validator is None:
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    validator.validate(document)
    for pod in pods([document]):
        spec = {name: value for name, value in pod.spec.items() if name not in _KNATIVE_ONLY}
        spec = copy.deepcopy(spec)
        for container in spec["containers"]:
            container.setdefault("name", "main")
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                # Knative fills in its one port, and lets probes be as often as can be.
                if document["kind"] == "Service" and probe in container:
                    container[probe]["httpGet"].setdefault("port", 8080)
        template = {"metadata": {"labels": pod.labels}, "spec": spec}
        kubernetes_validate.validate(
            {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": _METADATA,
                "template": template,
            },
            VERSION,
            strict=True,
        )


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


def test_the_guides_own_overlay_is_one(tmp_path: Path) -> None:
    guide = (FOLDER.parents[1] / "docs" / "kubernetes.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    here = os.path.relpath(FOLDER, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(text.replace("coldframe/images/k8s", here))
    (documents,) = build([tmp_path])
    for document in documents:
        check(document)
        assert document["metadata"]["namespace"] == "models"
    (container,) = one(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.internal/coldframe:cuda"
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
    ],
)
def test_a_wrong_field_is_found(overlay: str, kind: str, path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(_broken(overlay, kind, *path, value=value))
