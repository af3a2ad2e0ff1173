"""What platforms set, ask and grant, and containers that are run so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.images.conftest import Image
from tests.images.container import FOR_CRIU, Container, Platform
from tests.runtime.snapshots import eventually

__all__ = [
    "ASK",
    "COUNT",
    "LIMIT",
    "PLATFORMS",
    "PROMPT",
    "RIGHTS",
    "STORE",
    "Contract",
    "ready",
    "served",
    "startup",
    "text_of",
    "without_rights",
]

PROMPT = "Once upon a time a replica slept"
COUNT = 6
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
LIMIT = 3 << 30
STORE = "/var/lib/coldframe/snapshots"
RIGHTS: dict[str, Any] = {"user": (0, 0), "capabilities": FOR_CRIU, "confined": False}
"""Of a container in which snapshots are made, and clones started."""


class Contract(NamedTuple):
    """What a platform sets, asks and grants (docs/platforms.md).

    Args:
        place: Where it puts the model.
        env: Variables that it sets.
        args: What it starts the image with.
        port: Where it asks.
        health: Its route, which says 503 while weights load and 200 then.
        route: To which it sends requests.
        body: Makes one of OpenAI's.
        text: The answer's.
        grace_s: Between SIGTERM and SIGKILL.
    """

    place: str
    env: Mapping[str, str]
    args: list[str] | None
    port: int
    health: str
    route: str
    body: Callable[[dict[str, Any]], Any]
    text: Callable[[Any], str]
    grace_s: float


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


PLATFORMS = {
    "docker": Contract(
        "/models/demo",
        {"COLDFRAME_MODEL": "/models/demo"},
        None,
        8000,
        "/readyz",
        "/v1/completions",
        dict,
        text_of,
        10,
    ),
    "cloud-run": Contract(
        "/models/demo",
        {"COLDFRAME_MODEL": "/models/demo", "K_SERVICE": "demo", "PORT": "8080"},
        None,
        8080,
        "/readyz",
        "/v1/completions",
        dict,
        text_of,
        10,
    ),
    "sagemaker": Contract(
        "/opt/ml/model",
        {"SAGEMAKER_BIND_TO_PORT": "8080"},
        ["serve"],
        8080,
        "/ping",
        "/invocations",
        dict,
        text_of,
        30,
    ),
    "vertex": Contract(
        "/models/demo",
        {
            "AIP_HTTP_PORT": "8085",
            "AIP_HEALTH_ROUTE": "/alive",
            "AIP_PREDICT_ROUTE": "/answer",
            "COLDFRAME_MODEL": "/models/demo",
        },
        ["serve"],
        8085,
        "/alive",
        "/answer",
        lambda fields: {"instances": [fields]},
        lambda answer: str(answer["predictions"][0]),
        30,
    ),
}


def without_rights(contract: Contract, model: Path, **more: Any) -> Platform:
    """A container of the platform's that has no right to anything, but for what is said."""
    env = {**contract.env, **more.pop("env", {})}
    mounts = {contract.place: model, **more.pop("mounts", {})}
    return Platform(env=env, args=contract.args, mounts=mounts, memory=LIMIT, **more)


def ready(container: Container, contract: Contract) -> None:
    eventually(lambda: container.get(contract.port, contract.health).status_code == 200, seconds=90)


def startup(container: Container, port: int) -> Any:
    return container.get(port, "/startup").json()


@contextmanager
def served(image: Image, model: Path, **rights: Any) -> Iterator[Container]:
    """A container as Docker runs it, which listens."""
    contract = PLATFORMS["docker"]
    with image.run(without_rights(contract, model, **rights)) as container:
        container.listens(contract.port)
        yield container
