"""Prefill and decode on two hosts: clients ask the one, the other answers; its end is a pause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coldframe.loader.transport.nixl import nixl_package
from tests.runtime.serving import greedy, ids_of, served
from tests.runtime.snapshots import eventually
from tests.runtime.transport.hosts import Host, answer, names, two_hosts
from tests.runtime.transport.test_remote import SECRET, decode_worker
from tests.support import unavailable

pytestmark = pytest.mark.heavy

PROMPT = "Once upon a time, a replica slept at zero"
COUNT = 24
OTHER = "10.79.3.9"
"""Another address of the second host."""


@pytest.fixture
def model(demo_model: Callable[..., Path]) -> Path:
    return demo_model("llama")


def complete(host: Host, count: int) -> tuple[int, str]:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": count, "ignore_eos": True}
    status, text = host.ask("http://127.0.0.1:8000/v1/completions", body)
    return status, json.loads(text)["choices"][0]["text"] if status == 200 else text


def ready(host: Host, port: int = 8000) -> bool:
    return host.ask(f"http://127.0.0.1:{port}/readyz", seconds=5)[0] == 200


@pytest.mark.parametrize(
    ("way", "more"),
    [("tcp", ()), ("tcp", ("--kv-check",)), ("nixl", ())],
    ids=["tcp", "tcp-checked", "nixl"],
)
def test_what_one_host_begins_the_other_ends(
    way: str, more: tuple[str, ...], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "nixl" and nixl_package() is None:
        unavailable("there is no NIXL: pip install 'coldframe[nixl]'")
    # Both have one kernel, so that UCX would take shared memory.
    monkeypatch.setenv("UCX_TLS", "tcp")
    expected = greedy(model, ids_of(model, PROMPT), COUNT)
    with two_hosts() as (first, second):
        place = {"listen": second.address, "port": 7000, "under": second.under}
        with decode_worker(model, "--kv-ways", way, *more, **place) as worker:
            front = served(
                model,
                *("--port", 8000, "--decode", f"tcp://{second.address}:7000", "--kv-ways", way),
                under=first.under,
                COLDFRAME_KV_SECRET=SECRET,
                UCX_NET_DEVICES=first.device,
            )
            with front as server:
                before = second.received
                eventually(lambda: ready(first), seconds=60)
                assert complete(first, COUNT) == (200, expected)
                startup = json.loads(second.ask(f"http://{second.address}:8000/startup")[1])
                text = json.dumps(startup)
                assert "from another replica" in text, text
                assert "computed again" not in text
                # All of it has come over the link, by the one way that both have named.
                eventually(lambda: tickets(second)["taken"] >= 1, seconds=60)
                told = tickets(second)
                assert told["lost"] == 0
                assert second.received - before > told["bytes"] > 0
                assert server.process.poll() is None
            assert worker.process.poll() is None


def tickets(host: Host) -> dict[str, int]:
    """What has become of KV that was to come here: requests by outcome, and bytes."""
    text = host.ask(f"http://{host.address}:8000/metrics")[1]
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "coldframe_kv_tickets_total":
                found[sample.labels["outcome"]] = int(sample.value)
            elif sample.name == "coldframe_kv_taken_bytes_total":
                found["bytes"] = int(sample.value)
    return found


def test_decode_workers_are_all_addresses_of_a_name(model: Path, tmp_path: Path) -> None:
    """As a headless Service has them, whose name there is not while no pod is ready."""
    expected = greedy(model, ids_of(model, PROMPT), COUNT)
    records = tmp_path / "records"
    records.write_text("")
    with two_hosts() as (first, second), names(first, records):
        front = served(
            model,
            *("--port", 8000, "--decode", "dns://decode.test:7000"),
            under=first.under,
            COLDFRAME_KV_SECRET=SECRET,
        )
        place = {"port": 7000, "under": second.under}
        with front as server:
            eventually(lambda: "none is listed there" in server.log, seconds=60)
            body = {"prompt": PROMPT, "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
            client = first.start("http://127.0.0.1:8000/v1/completions", body)
            with decode_worker(model, listen=second.address, **place) as worker:
                assert not ready(first)
                records.write_text(f"decode.test {second.address}\n")
                status, text = answer(client)
                assert status == 200, text
                assert json.loads(text)["choices"][0]["text"] == expected
                eventually(lambda: ready(first), seconds=60)
                # Another one is behind the name, and this one is not any more.
                second.add(OTHER)
                with decode_worker(model, listen=OTHER, **place) as other:
                    records.write_text(f"decode.test {OTHER}\n")
                    eventually(lambda: "a replica came" in other.log, seconds=60)
                    eventually(lambda: "a replica went" in worker.log, seconds=60)
                    assert complete(first, COUNT) == (200, expected)
            assert server.process.poll() is None


def test_a_cable_that_is_pulled_is_a_pause(model: Path) -> None:
    """Whoever decodes elsewhere is given up; what it had goes on here."""
    expected = greedy(model, ids_of(model, PROMPT), COUNT)
    with two_hosts() as (first, second):
        place = {"listen": second.address, "port": 7000, "under": second.under}
        with decode_worker(model, **place) as worker:
            decode = f"native,tcp://{second.address}:7000"
            front = served(
                model,
                *("--port", 8000, "--decode", decode),
                under=first.under,
                COLDFRAME_KV_SECRET=SECRET,
            )
            with front:
                eventually(lambda: ready(first), seconds=60)
                body = {
                    "prompt": PROMPT,
                    "temperature": 0,
                    "ignore_eos": True,
                    "max_tokens": 200,
                    "n": 1,
                }
                url = "http://127.0.0.1:8000/v1/completions"
                clients = [first.start(url, body) for _ in range(6)]
                second.unplug()
                for client in clients:
                    status, text = answer(client)
                    assert status == 200, text
                    found = json.loads(text)["choices"][0]["text"]
                    assert found.startswith(expected)
            assert worker.process.poll() is None
