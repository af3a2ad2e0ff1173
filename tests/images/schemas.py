"""What an API server refuses: what no schema has, and what breaks a rule of a schema.

Schemas are Kubernetes' own, as `kubernetes_validate` has them, and those of CRDs. Their rules
(`x-kubernetes-validations`) are in CEL, which its makers' own implementation evaluates. Webhooks,
which may refuse more, are not here.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource

from tests.images.cel import holds
from tests.images.k8s import CRDS, Document, pods

__all__ = [
    "OLDEST",
    "VERSION",
    "Broken",
    "Rule",
    "broken",
    "check",
    "crd_schemas",
    "kubernetes_types",
    "rules",
]

VERSION = "1.36"
"""The Kubernetes whose schemas count: the first in which a pod's user namespaces are stable."""
OLDEST = "1.30"
"""The first that has all fields which ours use: AppArmor's profile is the latest of them."""

_KNATIVE_ONLY = (
    "containerConcurrency",
    "idleTimeoutSeconds",
    "responseStartTimeoutSeconds",
    "timeoutSeconds",
)
_METADATA = {"name": "test"}
_OWN = "x-coldframe-type"
"""Where a CRD repeats one of Kubernetes' types, our copy of it has that type's name here."""

Schema = dict[str, Any]


class Rule(NamedTuple):
    """A rule of a schema's.

    Args:
        place: What it is a rule of, as `spec.components[]`.
        message: What it is called in our copy.
        text: In CEL.
    """

    place: str
    message: str
    text: str

    @property
    def is_transition(self) -> bool:
        """Whether it compares with what there was before, so that a manifest alone says nothing."""
        return "oldSelf" in self.text


class Broken(Exception):
    """An object breaks rules, or has an entry twice; the messages are its arguments."""


def check(document: Document, version: str = VERSION) -> None:
    """Holds an object against its schema and the rules in it.

    Args:
        document: The object.
        version: The Kubernetes whose own kinds are meant.

    Raises:
        jsonschema.ValidationError: It has what its schema has not.
        kubernetes_validate.ValidationError: The same, of one of Kubernetes' own kinds.
        Broken: It breaks rules.
    """
    found = _crd(document["apiVersion"], document["kind"])
    if found is None:
        kubernetes_validate.validate(document, version, strict=True)
        return
    schema, validator = found
    validator.validate(document)
    messages = broken(schema, document)
    if messages:
        raise Broken(*messages)
    if document["kind"] == "Service":
        _check_knative_pods(document)


def _check_knative_pods(document: Document) -> None:
    """What Knative's schema passes on unseen is Kubernetes' own."""
    for pod in pods([document]):
        spec = {name: value for name, value in pod.spec.items() if name not in _KNATIVE_ONLY}
        spec = copy.deepcopy(spec)
        for container in spec["containers"]:
            container.setdefault("name", "main")
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                # Knative fills in its one port, and lets probes be as often as can be.
                if probe in container:
                    container[probe]["httpGet"].setdefault("port", 8080)
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": _METADATA,
            "template": {"metadata": {"labels": pod.labels}, "spec": spec},
        }
        kubernetes_validate.validate(template, VERSION, strict=True)


def crd_schemas() -> Iterator[tuple[str, str, Schema]]:
    """The versions of all CRDs: `group/version`, kind and schema."""
    for path in sorted(CRDS.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            yield f"{spec['group']}/{version['name']}", spec["names"]["kind"], schema


@functools.cache
def _crd(api_version: str, kind: str) -> tuple[Schema, jsonschema.Draft202012Validator] | None:
    """What holds a custom resource against its definition; None where it is no custom one."""
    for version, name, schema in crd_schemas():
        if (api_version, kind) == (version, name):
            strict = _closed(schema)
            jsonschema.Draft202012Validator.check_schema(strict)
            return schema, jsonschema.Draft202012Validator(strict, registry=_own_types()[0])
    return None


def _closed(schema: Any) -> Any:
    """A CRD's schema that takes no field it does not name, as `kubectl apply` does not."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if _OWN in schema:
        return {"$ref": f"{_own_types()[1]}#/$defs/{schema[_OWN]}"}
    made = {
        key: {name: _closed(part) for name, part in value.items()}
        if key == "properties"
        else _closed(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@functools.cache
def kubernetes_types() -> dict[str, Schema]:
    """Kubernetes' own types by their names, as `io.k8s.api.core.v1.Pod`."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    place = Path(str(folder)) / f"v{VERSION}.0-local-strict" / "_definitions.json"
    return dict(json.loads(place.read_text())["$defs"])


@functools.cache
def _own_types() -> tuple[Registry[Any], str]:
    name = "/api/_definitions.json"  # as they call one another
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": name,
        "$defs": kubernetes_types(),
    }
    return Resource.from_contents(schema) @ Registry(), name


def rules(schema: Schema, place: str = "") -> Iterator[Rule]:
    """All rules in a schema."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield Rule(place, rule["message"], rule["rule"])
    for name, part in schema.get("properties", {}).items():
        yield from rules(part, f"{place}.{name}".lstrip("."))
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(key), dict):
            yield from rules(schema[key], place + mark)


def broken(schema: Schema, value: Any) -> list[str]:
    """What is wrong with a value by the rules of its schema: the messages.

    Rules that compare with what there was before are left out; lists whose entries have keys, or
    are a set, have no entry twice.

    Args:
        schema: A structural one, of a CRD.
        value: What fits the schema otherwise.
    """
    return list(_broken(schema, _with_defaults(schema, value)))


def _broken(schema: Schema, value: Any) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        found = Rule("", rule["message"], rule["rule"])
        if not found.is_transition and not holds(found.text, value):
            yield found.message
    if isinstance(value, dict):
        for name, part in value.items():
            inside = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(inside, dict):
                yield from _broken(inside, part)
    elif isinstance(value, list):
        yield from _twice(schema, value)
        for part in value:
            yield from _broken(schema.get("items", {}), part)


def _twice(schema: Schema, value: list[Any]) -> Iterator[str]:
    kind = schema.get("x-kubernetes-list-type")
    if kind == "map":
        keys = [[part.get(key) for key in schema["x-kubernetes-list-map-keys"]] for part in value]
    else:
        keys = value if kind == "set" else []
    for place, key in enumerate(keys):
        if key in keys[:place]:
            yield f"{key} is there twice"


def _with_defaults(schema: Schema, value: Any) -> Any:
    """A value as the API server has it when it looks at the rules."""
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        whole = {name: part["default"] for name, part in parts.items() if "default" in part}
        rest = schema.get("additionalProperties")
        return {
            name: _with_defaults(parts.get(name, rest if isinstance(rest, dict) else {}), part)
            for name, part in {**whole, **value}.items()
        }
    if isinstance(value, list):
        return [_with_defaults(schema.get("items", {}), part) for part in value]
    return value
