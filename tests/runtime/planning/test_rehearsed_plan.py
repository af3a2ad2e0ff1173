"""A plan whose starts were rehearsed, beside an endpoint that really runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.runtime.planning.footprint import footprint
from tests.runtime.planning.plans import plan
from tests.runtime.serving import Server, served

KEY = "planted-node-key-123"

# What a page of a library counts for is shared by all who have it mapped: other replicas, too.
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def model(demo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its own, that nobody else evicts or maps.
    own = tmp_path_factory.mktemp("own") / "model"
    return Path(shutil.copytree(demo_model("llama", "bfloat16"), own))


@pytest.fixture(scope="module")
def rehearsed(model: Path, cache: Path) -> dict[str, Any]:
    return plan(cache, model)


@pytest.fixture(scope="module")
def endpoint(model: Path) -> Iterator[Server]:
    with served(model, "--model-name", "m", COLDFRAME_API_KEYS=KEY) as server:
        server.ready()
        yield server


def test_every_start_has_a_time_or_a_reason(rehearsed: dict[str, Any], cache: Path) -> None:
    starts = rehearsed["starts"]
    cells = [(s["tier"], s["cache"], s["through"]) for s in starts]
    tiers = ("fresh", "template", "restored", "parked", "warm")
    assert cells == [(t, c, h) for t in tiers for c in ("cold", "warm") for h in ("run", "http")]
    for start in starts:
        assert (start["ttft_s"] is None) == (start["why"] is not None)
        if start["ttft_s"] is not None:
            assert 0 < start["ttft_s"] < 60
            assert all(part >= 0 for part in start["parts"].values())
    times = {cell: s["ttft_s"] for cell, s in zip(cells, starts, strict=True)}
    for cell, why in ((("restored", "cold", "run"), "image"), (("warm", "warm", "run"), "a run")):
        assert times[cell] is None
        assert why in starts[cells.index(cell)]["why"]
    for cache_state in ("cold", "warm"):
        for through in ("run", "http"):
            fresh = starts[cells.index(("fresh", cache_state, through))]
            assert fresh["parts"]["worker"] < fresh["ttft_s"]
        # A replica that is there is faster than one that is not.
        assert times["warm", cache_state, "http"] < times["fresh", cache_state, "http"]
    # The kernel may have dropped the files meanwhile; then it is told like that.
    now = "warm" if rehearsed["rate_bytes_per_s"] is None else "cold"
    assert rehearsed["next_start"] == {"tier": "fresh", "cache": now, "through": "run"}
    assert rehearsed["predicted_ttft_s"] == times["fresh", now, "run"]
    # Of scale models nothing is left.
    assert os.listdir(cache) == ["coldframe"]


def test_what_was_measured_is_kept(rehearsed: dict[str, Any], model: Path, cache: Path) -> None:
    first = rehearsed["calibration"]
    assert (first["source"], first["rehearsals"]) == ("rehearsed now", 1)
    again = plan(cache, model, "--rate", "1MB/s")
    calibration = again["calibration"]
    assert (calibration["source"], calibration["rehearsals"]) == ("kept", 1)
    assert calibration["kept_in"] == first["kept_in"]
    assert calibration["age_s"] > first["age_s"]
    # At a crawl, it is the bytes.
    cold = again["starts"][0]
    bytes_s = again["read_bytes"] / 1e6
    assert cold["ttft_s"] > bytes_s + cold["parts"]["until_first_byte"]
    assert cold["parts"]["weights"] == pytest.approx(bytes_s)


def test_the_memory_is_that_of_a_replica(rehearsed: dict[str, Any], endpoint: Server) -> None:
    answer = endpoint_answer(endpoint)
    assert answer["choices"][0]["text"]
    measured = footprint(endpoint.process.pid)
    (predicted,) = (
        replica
        for replica in rehearsed["memory"]["replica"]
        if (replica["tier"], replica["through"]) == ("fresh", "http")
        and replica["weights"] == "mapped"
    )
    assert predicted["pss"] == pytest.approx(measured.total, rel=0.1)
    # Of weights this small, what is mapped depends on how large the page cache's folios are.
    assert 0 < predicted["parts"]["weights"] <= rehearsed["weights_bytes"]
    for replica in rehearsed["memory"]["replica"]:
        assert replica["parts"]["processes"] > 100e6  # two workers' torch, whatever the tier
    assert rehearsed["memory"]["overhead_source"] == "measured"


def test_pss_is_what_others_count(endpoint: Server) -> None:
    front = psutil.Process(endpoint.process.pid)
    found = footprint(front.pid)
    processes = [front, *front.children(recursive=True)]
    expected = sum(process.memory_full_info().pss for process in processes)
    assert found.total == pytest.approx(expected, rel=0.02)
    assert found.total == found.own + found.weights + found.kv
    assert found.own == sum(found.processes.values())
    assert {"front", "memory", "worker", "gateway"} <= set(found.processes)


def endpoint_answer(endpoint: Server) -> Any:
    import httpx

    body = {"model": "m", "prompt": list(range(5, 69)), "max_tokens": 16, "ignore_eos": True}
    url, head = f"{endpoint.url}/v1/completions", {"x-api-key": KEY}
    return httpx.post(url, json=body, headers=head, timeout=60).json()


def test_nodes_are_ranked_beside_this_machine(
    rehearsed: dict[str, Any], model: Path, cache: Path, endpoint: Server, tmp_path: Path
) -> None:
    nodes = tmp_path / "nodes.json"
    full = {"name": "full", "memory_free": "1MB", "weights": "page_cache"}
    gone = {"name": "gone", "url": "http://127.0.0.1:1"}
    nodes.write_text(json.dumps([full, gone]))
    named = ("--node", endpoint.url, "--nodes", nodes, "--device", "cpu,cuda:0")
    env = {"COLDFRAME_NODE_KEY": KEY, "CUDA_VISIBLE_DEVICES": ""}
    places = plan(cache, model, *named, **env)["placement"]
    by_name = {place["name"]: place for place in places}
    first = places[0]
    assert (first["name"], first["tier"], first["fits"]) == (endpoint.url, "warm", True)
    assert places[1]["name"] == "cpu"
    assert by_name["full"]["fits"] is False
    assert {p["name"] for p in places if not p["reachable"]} == {"gone", "cuda:0"}
    # Without the key it says nothing.
    (shut,) = (
        place
        for place in plan(cache, model, "--node", endpoint.url)["placement"]
        if place["name"] == endpoint.url
    )
    assert not shut["reachable"]
    assert "it wants a key" in shut["why"][0]


def test_an_endpoint_says_what_it_has(endpoint: Server, model: Path) -> None:
    import httpx

    assert endpoint.get("/placement").status_code == 401
    told = httpx.get(f"{endpoint.url}/placement", headers={"x-api-key": KEY}, timeout=30).json()
    found = told["models"]["m"]
    assert (found["state"], found["device"], found["image"]) == ("ready", "cpu", False)
    assert found["weights"]["at"] == "memory"
    assert found["weights"]["cached"] > 0
    assert found["memory_available"] > 0
    assert found["looked"]
    assert found["fingerprint"] == Checkpoint.open(model).fingerprint
    last = found["last_start"]
    assert last["ttft_s"] > 0
    assert (last["tier"], last["cache"] in ("cold", "warm")) == ("fresh", True)
