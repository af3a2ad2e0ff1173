"""The manifests of images/k8s: built as `kubectl apply -k` builds them, by kustomize's own code."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "images" / "k8s"
CRDS = Path(__file__).parent / "crds"
IMAGE = "registry.example/coldframe:"
"""What our images begin with, for a user to put another name in its place."""

Document = dict[str, Any]


def _kustomizations(kind: str) -> list[str]:
    found = []
    for path in sorted(FOLDER.rglob("kustomization.yaml")):
        if yaml.safe_load(path.read_text())["kind"] == kind:
            found.append(str(path.parent.relative_to(FOLDER)))
    return found


OVERLAYS = [name for name in _kustomizations("Kustomization") if name != "base"]
"""What is there to be applied as it is."""
COMPONENTS = _kustomizations("Component")

_READ_ONLY = "components/snapshots-read-only"
_RIGHTS = ("components/snapshots", "components/user-namespace")
_MODELS = ("components/model-volume", "components/model-s3")
_PLAIN = [name for name in COMPONENTS if name not in (*_RIGHTS, _READ_ONLY, *_MODELS)]


def _combined() -> list[tuple[str, ...]]:
    """Each overlay with every component that does not say what is said already."""
    found = []
    for overlay in OVERLAYS:
        if overlay.startswith("dynamo"):  # its parts are in a list of its own
            continue
        inside = _within(overlay)
        plain = [name for name in _PLAIN if name not in inside]
        rights = [name for name in _RIGHTS if name not in inside]
        if not rights[1:]:  # it has snapshots
            found.append((overlay, *plain, *rights))
            found.append((overlay, _READ_ONLY))
        else:
            found += [(overlay, *plain), (overlay, *plain, *rights)]
    return found


@functools.cache
def _within(overlay: str) -> frozenset[str]:
    """The kustomizations that one is made of, its own name among them."""
    folder = FOLDER / overlay
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = {overlay}
    for name in [*said.get("resources", ()), *said.get("components", ())]:
        other = (folder / name).resolve()
        if other.is_dir():
            found |= _within(str(other.relative_to(FOLDER)))
    return frozenset(found)


def is_privileged(name: Sequence[str] | str) -> bool:
    """Whether a set of manifests asks for more than the restricted standard gives."""
    names = [name] if isinstance(name, str) else name
    return any("components/snapshots" in _within(part) for part in names)


COMBINED = _combined()
"""Everything at once: components must not be in one another's way."""


_BUILD = """
import asyncio, json, sys
from pykustomize import Kustomizer

async def build(folders):
    kustomizer = Kustomizer()
    return [(await kustomizer.build(folder)).yaml for folder in folders]

print(json.dumps(asyncio.run(build(json.load(sys.stdin)))))
"""
# In a process of its own: kustomize is Go, whose runtime brings threads and signal handlers.


def built(*names: str) -> tuple[Document, ...]:
    """The objects that an overlay stands for.

    Args:
        names: An overlay, and components that are added to it; of `OVERLAYS` or `COMBINED`.
    """
    return _all_built()[names]


@functools.cache
def _all_built() -> dict[tuple[str, ...], tuple[Document, ...]]:
    sets = [*((name,) for name in OVERLAYS), *COMBINED]
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for number, names in enumerate(sets):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            resources, *components = (os.path.relpath(FOLDER / name, folder) for name in names)
            said = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [resources],
                "components": components,
            }
            (folder / "kustomization.yaml").write_text(json.dumps(said))
            folders.append(folder)
        return dict(zip(sets, build(folders), strict=True))


def build(folders: Sequence[Path]) -> list[tuple[Document, ...]]:
    """The objects that kustomizations stand for.

    Args:
        folders: Each has a `kustomization.yaml`.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", _BUILD],
        input=json.dumps([str(folder) for folder in folders]),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(yaml.load_all(text, _LOADER)) for text in json.loads(done.stdout)]


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def one(documents: Sequence[Document], kind: str, name: str | None = None) -> Document:
    """The one object of a kind, and of a name."""
    found = [
        document
        for document in documents
        if document["kind"] == kind and name in (None, document["metadata"]["name"])
    ]
    assert len(found) == 1, (kind, name, len(found))
    return found[0]


@dataclass(frozen=True)
class Pod:
    """What a workload makes pods of.

    Args:
        name: The workload's, and where it has several, the part's.
        kind: `Deployment`, `Service` (Knative's) or `DynamoGraphDeployment`.
        labels: Of the pods.
        spec: As Kubernetes has it; Knative's with fields of its own.
    """

    name: str
    kind: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def pods(documents: Sequence[Document]) -> Iterator[Pod]:
    """The pods that come of some objects."""
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        if kind == "DynamoGraphDeployment":
            for part in document["spec"]["components"]:
                template = part["podTemplate"]
                labels = template.get("metadata", {}).get("labels", {})
                yield Pod(f"{name}/{part['name']}", kind, labels, template["spec"])
        elif "template" in document.get("spec", {}):
            template = document["spec"]["template"]
            yield Pod(name, kind, template["metadata"].get("labels", {}), template["spec"])


def ours(pod: Pod) -> Iterator[dict[str, Any]]:
    """A pod's containers that run `coldframe`."""
    for container in pod.containers:
        if container["image"].startswith(IMAGE):
            yield container


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The variables whose values a manifest says; those of Secrets have none here."""
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
