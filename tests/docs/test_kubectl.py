"""What the pages have `kubectl` do fits the manifests: names, keys, ports.

There is no cluster here. Each line is read as kubectl would, in the few forms that the pages have,
and held against the objects that its block applies: what it makes must be what they ask for.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.commands import ROOT, Block, blocks, calls, spans
from tests.images.k8s import FOLDER, OVERLAYS, build, built

Document = dict[str, Any]
GUIDE = ROOT / "docs" / "kubernetes.md"
BLOCKS = [block for block in blocks() if any(line.program == "kubectl" for line in block.lines)]


class Told:
    """A line of kubectl's.

    Attributes:
        namespace: Of `-n`.
        words: The rest without flags.
        flags: Each with its values.
    """

    def __init__(self, text: str) -> None:
        arguments = [word for call in calls(text) for word in call.arguments]
        self.namespace = ""
        self.words: list[str] = []
        self.flags: dict[str, list[str]] = {}
        rest = iter(arguments)
        for word in rest:
            if word in ("-n", "-k"):
                value = next(rest)
                if word == "-n":
                    self.namespace = value
                else:
                    self.flags["-k"] = [value]
            elif word.startswith("--"):
                name, _, value = word.partition("=")
                self.flags.setdefault(name, []).append(value)
            else:
                self.words.append(word)


def told(block: Block) -> list[Told]:
    return [Told(line.text) for line in block.lines if line.program == "kubectl"]


def applied(block: Block) -> tuple[Document, ...]:
    """The objects of the block's `apply`."""
    (folder,) = [where for line in told(block) for where in line.flags.get("-k", ())]
    if folder == ".":
        return guides_own()
    name = folder.removeprefix("images/k8s/")
    assert name in OVERLAYS, folder
    return built(name)


@cache
def guides_own() -> tuple[Document, ...]:
    """Those of the overlay that the guide shows."""
    (text,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", GUIDE.read_text(), re.DOTALL)
    with tempfile.TemporaryDirectory() as scratch:
        here = os.path.relpath(FOLDER, scratch)
        (Path(scratch) / "kustomization.yaml").write_text(
            text.replace("coldframe/images/k8s", here)
        )
        (documents,) = build([Path(scratch)])
    return tuple(documents)


def secrets(node: Any) -> Iterator[tuple[str, str]]:
    """Secrets that an object asks for, by name and key."""
    if isinstance(node, dict):
        match node:
            case {"secretKeyRef": {"name": name, "key": key, **more}} if not more.get("optional"):
                yield name, key
            case {"secret": {"secretName": name, "items": items}}:
                yield from ((name, item["key"]) for item in items)
            case {"secret": {"secretName": name, **more}} if not more.get("optional"):
                yield name, "*"
        for child in node.values():
            yield from secrets(child)
    elif isinstance(node, list):
        for child in node:
            yield from secrets(child)


def test_there_are_such_blocks() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])
def test_secrets_are_those_that_pods_ask_for(block: Block) -> None:
    """All of them, too: a pod whose Secret is not there does not start."""
    made: dict[str, set[str]] = {}
    for line in told(block):
        if line.words[:3] == ["create", "secret", "generic"]:
            (name,) = line.words[3:]
            files = [value.partition("=")[0] for value in line.flags.get("--from-file", ())]
            texts = [value.partition("=")[0] for value in line.flags.get("--from-literal", ())]
            made[name] = {*files, *texts}
    wanted: dict[str, set[str]] = {}
    for document in applied(block):
        for name, key in secrets(document):
            wanted.setdefault(name, set()).add(key)
    assert set(made) == set(wanted)
    read = [text for document in applied(block) for text in texts_of(document)]
    for name, keys in wanted.items():
        assert keys - {"*"} <= made[name], name
        if "*" in keys:  # it is mounted whole, and read by its keys
            for key in made[name]:
                assert any(text.endswith(f"/{key}") for text in read), (name, key)


def texts_of(node: Any) -> Iterator[str]:
    """All texts in an object."""
    if isinstance(node, dict):
        for child in node.values():
            yield from texts_of(child)
    elif isinstance(node, list):
        for child in node:
            yield from texts_of(child)
    elif isinstance(node, str):
        yield node


@pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])
def test_the_rest_is_there(block: Block) -> None:
    objects = applied(block)
    spaces = {line.namespace for line in told(block)} - {""}
    for line in told(block):
        match line.words:
            case ["create", "namespace", name] | ["label", "namespace", name, _]:
                spaces.add(name)
            case ["create", "secret", "generic", _] | ["apply"]:
                continue
            case ["port-forward", where, ports]:
                here, _, there = ports.partition(":")
                assert int(there) in ports_of(objects, where.removeprefix("service/")), where
                asked = " ".join(other.text for other in block.lines if other.program == "curl")
                assert not asked or f"127.0.0.1:{here}/" in asked
            case other:
                raise AssertionError(f"what does kubectl {shlex.join(other)} do?")
    placed = {document["metadata"].get("namespace", "") for document in objects} - {""}
    assert len(spaces | placed) <= 1


def ports_of(objects: tuple[Document, ...], service: str) -> set[int]:
    """Those of a Service, also of one that Dynamo's operator makes of a component."""
    found = set()
    for document in objects:
        name = document["metadata"]["name"]
        if document["kind"] == "Service" and name == service:
            found |= {port["port"] for port in document["spec"]["ports"]}
        if document["kind"] == "DynamoGraphDeployment":
            for component in document["spec"]["components"]:
                if f"{name}-{component['name'].lower()}" == service:
                    found.add(8000)
    return found


def test_what_sentences_scale_is_there() -> None:
    scaled = [Told(text) for _, text in spans() if text.startswith("kubectl scale ")]
    assert len(scaled) == 1
    for line in scaled:
        kind, _, name = line.words[1].partition("/")
        deployments = {
            document["metadata"]["name"]
            for document in built("prefill-decode")
            if document["kind"].lower() == kind
        }
        assert name in deployments
        assert int(line.flags["--replicas"][0]) > 0


def test_a_secret_that_is_asked_for_is_seen() -> None:
    document = yaml.safe_load("{env: [{valueFrom: {secretKeyRef: {name: a, key: b}}}]}")
    assert list(secrets(document)) == [("a", "b")]
