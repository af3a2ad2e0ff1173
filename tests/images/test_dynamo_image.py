"""The image of a worker of Dynamo's: what it has more than the one below it, and that it serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.images.building import IMAGES, Builder
from tests.images.conftest import Image
from tests.images.container import Platform, container, layers_of
from tests.images.contents import compiled, nobodys, requirements_unmet, site_of, tag_of
from tests.images.networks import network
from tests.images.platforms import ASK, COUNT, LIMIT, PROMPT, text_of
from tests.runtime.serving import ids_of, tokenizer
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]

PORT = 8000
CLIENT = """
import asyncio, json, sys
from dynamo.runtime import DistributedRuntime

async def ask():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    client = await runtime.endpoint("dynamo.backend.generate").client()
    (worker,) = await client.wait_for_instances()
    tokens = []
    async for said in await client.direct(json.loads(sys.argv[1]), worker):
        tokens += said.data()["token_ids"]
    print("tokens", json.dumps(tokens), flush=True)
    runtime.shutdown()

asyncio.run(asyncio.wait_for(ask(), 90))
"""


@pytest.fixture(scope="module")
def image(builder: Builder, mounted: Callable[[str], Image]) -> Image:
    """The one of images/dynamo.Dockerfile, on the CPU's."""
    return mounted(builder.dynamo())


def test_it_is_within_its_budget(image: Image) -> None:
    words = [sys.executable, IMAGES / "check_budget.py", "dynamo", image.root]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dynamo" in done.stdout


def test_it_is_a_layer_more_of_what_a_worker_needs(
    builder: Builder, mounted: Callable[[str], Image], image: Image
) -> None:
    below = layers_of(mounted(builder.cpu()).root)[1:]  # without the container's own
    own, *others = layers_of(image.root)[1:]
    assert [path.resolve() for path in others] == [path.resolve() for path in below]
    site = own / site_of(image).relative_to(image.root)
    names = {path.name.partition("-")[0] for path in site.iterdir()}
    assert names == {"ai_dynamo_runtime", "dynamo", "uvloop"}
    assert compiled(site, tag_of(image)) > 20
    # Nothing is run in it that is not in the other.
    assert image.config["Entrypoint"][-1] == "/opt/coldframe/bin/coldframe"
    assert image.config["Cmd"] == ["worker", "--dynamo"]
    assert image.config["User"] == "65532:65532"


def test_nothing_that_is_asked_for_is_missing(image: Image) -> None:
    missing = requirements_unmet(site_of(image))
    # One says what it was made with, the other what it downloads with.
    known = ("ai-dynamo-runtime wants pydantic", "tokenizers wants huggingface-hub")
    assert all(line.startswith(known) for line in missing), missing


def test_nothing_is_there_that_nobody_asks_for(image: Image) -> None:
    assert nobodys(site_of(image), ("coldframe", "s3"), ("coldframe", "dynamo")) == set()


def test_a_worker_registers_as_nobody_and_answers_dynamos_clients(
    image: Image, model: Path, expected: str, tmp_path: Path
) -> None:
    discovery = tmp_path / "kv"
    discovery.mkdir()
    discovery.chmod(0o777)  # the container's user is none of this machine's
    with network() as place:
        platform = Platform(
            env={
                "COLDFRAME_MODEL": "/models/demo",
                "DYN_DISCOVERY_BACKEND": "file",
                "DYN_EVENT_PLANE": "zmq",
                "DYN_EVENT_PLANE_HOST": "127.0.0.1",
                "DYN_FILE_KV": "/kv",
                "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
                "DYN_TCP_RPC_HOST": "127.0.0.1",
                "HOME": "/tmp",
            },
            mounts={"/models/demo": model},
            writable={"/kv": discovery},
            memory=LIMIT,
            network=place,
        )
        with image.run(platform) as worker:
            worker.listens(PORT)
            eventually(lambda: _registered(discovery), seconds=90)
            assert text_of(worker.post(PORT, "/v1/completions", ASK).json()) == expected
            assert _told_by_dynamo(image, platform, model) == expected
            for pid in worker.pids():
                assert worker.status(pid)["Uid"].split() == ["65532"] * 4
            worker.signal("TERM")
            assert worker.end(60) == 0, worker.log
            assert not _registered(discovery)


def _registered(discovery: Path) -> list[str]:
    """Workers that a discovery's folder knows."""
    folder = discovery / "v1" / "instances"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _told_by_dynamo(image: Image, platform: Platform, model: Path) -> str:
    """What the worker answers to Dynamo's own client, in a container beside it."""
    request = {
        "model": "demo",
        "token_ids": ids_of(model, PROMPT),
        "stop_conditions": {"max_tokens": COUNT, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
        "output_options": {},
        "eos_token_ids": [],
        "annotations": [],
    }
    config = {**image.config, "Entrypoint": ["/opt/coldframe/bin/python", "-c", CLIENT]}
    with container(image.root, config, replace(platform, args=[json.dumps(request)])) as client:
        assert client.end(120) == 0, client.log
        (line,) = (line for line in client.log.splitlines() if line.startswith("tokens "))
    return str(tokenizer(model).decode(json.loads(line.removeprefix("tokens "))))
