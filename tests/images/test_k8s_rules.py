"""The rules of CRDs' schemas: each refuses what breaks it, and nothing of ours breaks one."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.images.k8s import Document, built, one
from tests.images.schemas import Broken, Rule, broken, check, crd_schemas, kubernetes_types, rules

Edit = tuple[tuple[Any, ...], Any]

RULES = [(kind, rule) for _, kind, schema in crd_schemas() for rule in rules(schema)]
_OVERLAYS = {"DynamoGraphDeployment": "dynamo", "HTTPScaledObject": "keda-http"}

_PART = ("spec", "components", 1)
_FRONT = ("spec", "components", 0)
_METADATA = (*_PART, "podTemplate", "metadata")
_TRIAL = (*_PART, "experimental")
_PORT = "one port"
_POLICY = {"domain": "zone", "labelKey": "topology.kubernetes.io/zone"}
_LATER = "no pods yet"
_CLIENTS = [{"name": "a", "podTemplate": {}}]


def _policy(**more: Any) -> list[Edit]:
    return [(("spec", "experimental"), {"kvTransferPolicy": {**_POLICY, **more}})]


def _memory(**fields: Any) -> list[Edit]:
    return [(_TRIAL, {"gpuMemoryService": fields})]


# What breaks the rule of a place: what is put where, in an object of ours.
BREAKS: dict[tuple[str, str], list[Edit]] = {
    (
        "spec.components[].eppConfig",
        "one config",
    ): [((*_PART, "type"), "epp"), ((*_PART, "eppConfig"), {})],
    (
        "spec.components[].experimental.checkpoint",
        "no job beside a reference",
    ): [(_TRIAL, {"checkpoint": {"enabled": True, "checkpointRef": "warm", "job": {}}})],
    (
        "spec.components[].experimental.gpuMemoryService",
        "containers within a pod",
    ): _memory(mode="InterPod", extraClientContainers=["a"]),
    (
        "spec.components[].experimental.gpuMemoryService",
        "pods between pods",
    ): _memory(extraClientPods=_CLIENTS),  # the mode is a default's
    (
        "spec.components[].experimental.gpuMemoryService",
        _LATER,
    ): _memory(mode="InterPod", extraClientPods=_CLIENTS),
    (
        "spec.components[].podTemplate.metadata.annotations",
        "a backend that there is",
    ): [((*_METADATA, "annotations"), {"nvidia.com/vllm-distributed-executor-backend": "Uni"})],
    (
        "spec.components[]",
        "an epp's config",
    ): [((*_PART, "eppConfig"), {"configMapRef": {"key": "config"}})],
    (
        "spec.components[]",
        "no more available than there are",
    ): [((*_PART, "minAvailable"), 3)],
    (
        "spec.components",
        "one epp",
    ): [((*_FRONT, "type"), "epp"), ((*_PART, "type"), "epp")],
    (
        "spec.components",
        "each name once",
    ): [((*_FRONT, "name"), "Prefill")],
    (
        "spec.experimental.kvTransferPolicy.labelKey",
        "a short prefix",
    ): _policy(labelKey=f"{'a.' * 126}ab/zone"),
    (
        "spec.experimental.kvTransferPolicy",
        "one topology",
    ): _policy(clusterTopologyName="racks"),
    (
        "spec.experimental.kvTransferPolicy",
        "a preference has a weight",
    ): _policy(enforcement="preferred"),
    (
        "spec.experimental.kvTransferPolicy",
        "a weight is a preference's",
    ): _policy(preferredWeight=0.5),
    ("spec.coldStartTimeoutFailoverRef", _PORT): [
        (("spec", "coldStartTimeoutFailoverRef"), {"service": "other"})
    ],
    ("spec.scaleTargetRef", _PORT): [(("spec", "scaleTargetRef", "portName"), "http")],
}
# What goes by what there was before: a manifest alone cannot break it.
TRANSITIONS = {
    "minAvailable stays",
    "type stays",
    "no restart of what is new",
}
# What stands to these as they do to the broken ones, and breaks nothing.
KEEPS: list[list[Edit]] = [
    [((*_PART, "type"), "epp"), ((*_PART, "eppConfig"), {"configMapRef": {"key": "config"}})],
    [(_TRIAL, {"checkpoint": {"enabled": True, "checkpointRef": "warm"}})],
    _memory(extraClientContainers=["a"]),
    [((*_METADATA, "annotations"), {"nvidia.com/vllm-distributed-executor-backend": "Ray"})],
    [((*_PART, "minAvailable"), 2)],
    [((*_PART, "minAvailable"), 3), ((*_PART, "replicas"), 0)],
    _policy(labelKey=f"{'a.' * 126}a/zone"),
    _policy(enforcement="preferred", preferredWeight=0.5),
]


def _edited(kind: str, edits: list[Edit]) -> Document:
    """An object of ours with other things at some places."""
    document = copy.deepcopy(one(built(_OVERLAYS[kind]), kind))
    for path, value in edits:
        place = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    return document


def test_each_rule_is_broken_by_something_or_goes_by_what_was_before() -> None:
    alone = {(rule.place, rule.message) for _, rule in RULES if not rule.is_transition}
    assert alone == set(BREAKS)
    assert {rule.message for _, rule in RULES if rule.is_transition} == TRANSITIONS


@pytest.mark.parametrize(
    ("kind", "rule"),
    [(kind, rule) for kind, rule in RULES if not rule.is_transition],
    ids=lambda part: part.message.replace(" ", "-") if isinstance(part, Rule) else part,
)
def test_what_breaks_a_rule_is_refused_by_it(kind: str, rule: Rule) -> None:
    # Its schema has nothing against it.
    with pytest.raises(Broken) as refused:
        check(_edited(kind, BREAKS[rule.place, rule.message]))
    also = {_LATER} if rule.message == "pods between pods" else set()
    assert set(refused.value.args) == {rule.message, *also}


@pytest.mark.parametrize("edits", KEEPS, ids=str)
def test_what_keeps_them_is_not(edits: list[Edit]) -> None:
    check(_edited("DynamoGraphDeployment", edits))


def test_nothing_is_twice_in_a_list_with_keys_nor_in_a_set() -> None:
    graph = _edited("DynamoGraphDeployment", _memory(extraClientContainers=["a", "b", "a"]))
    with pytest.raises(Broken, match="a is there twice"):
        check(graph)
    graph = _edited("DynamoGraphDeployment", [((*_FRONT, "name"), "prefill")])
    with pytest.raises(Broken, match=r"\['prefill'\] is there twice"):
        check(graph)


def test_kubernetes_own_types_have_no_rules() -> None:
    types = kubernetes_types().values()
    # What else Kubernetes says in such words is there.
    assert any("x-kubernetes-list-type" in str(schema) for schema in types)
    assert not [rule for schema in types for rule in rules(schema)]


def test_rules_are_looked_for_in_all_of_a_schema() -> None:
    rule = [{"message": "must be 1", "rule": "self == 1"}]
    schema = {
        "properties": {"a": {"items": {"x-kubernetes-validations": rule}}},
        "additionalProperties": {"additionalProperties": {"x-kubernetes-validations": rule}},
    }
    assert [found.place for found in rules(schema)] == ["a[]", "{}{}"]
    assert broken(schema, {"a": [1, 2], "b": {"c": 3}, "d": {"c": 1}}) == ["must be 1"] * 2
