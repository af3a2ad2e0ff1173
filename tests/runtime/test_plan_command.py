"""What `coldframe plan` says, against the files, Transformers and a replica that really starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from coldframe.runtime.cli import main
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import Replica
from coldframe.runtime.units import human_bytes
from tests.runtime.helpers import ask, finish, prompt_of

Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def plan(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def tensors(model: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_bytes_are_those_of_the_files(demo_model: Make, capsys: Capture, family: str) -> None:
    model = demo_model(family)
    document = plan(capsys, model, "--rate", "1MB/s")
    weights = tensors(model)
    total = sum(tensor.nbytes for tensor in weights.values())
    assert document["weights_bytes"] == total
    stages = document["stages"]
    layers = len({name.split(".")[2] for name in weights if ".layers." in name})
    names = ["embedding", *(f"layer {i}" for i in range(layers)), "head"]
    assert [stage["name"] for stage in stages] == names
    for index in range(layers):
        inside = [t.nbytes for name, t in weights.items() if f".layers.{index}." in name]
        # Gaps between neighbours are read along, where that saves a read.
        assert sum(inside) <= stages[index + 1]["bytes"] < 1.05 * sum(inside) + 4096
    assert sum(stage["bytes"] for stage in stages) == document["read_bytes"] >= total
    # At a given rate each stage is there when its last byte is.
    read = 0
    for stage in stages:
        read += stage["bytes"]
        assert stage["ready_s"] == pytest.approx(read / 1e6)
        assert stage["extents"] >= 1
    assert document["predicted_load_s"] == pytest.approx(document["read_bytes"] / 1e6)
    assert document["rate_source"] == "given"
    assert document["predicted_ttft_s"] >= document["predicted_load_s"]


def test_the_memory_is_that_of_the_model(demo_model: Make, capsys: Capture) -> None:
    model = demo_model("llama")
    document = plan(capsys, model, "--context", 96, "--batch", 3)
    memory = document["memory"]
    cache = AutoModelForCausalLM.from_pretrained(model, dtype="auto")(
        torch.ones(1, 96, dtype=torch.int64), use_cache=True
    ).past_key_values
    keys_and_values = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert memory["kv"] == 3 * keys_and_values
    assert memory["weights"] >= sum(file.stat().st_size for file in model.glob("*.safetensors"))
    parts = ("weights", "kv", "activations", "overhead")
    assert memory["total"] == sum(memory[part] for part in parts)
    # A sequence takes whole blocks.
    assert plan(capsys, model, "--context", 97, "--batch", 1)["memory"]["kv"] == (
        keys_and_values * 128 // 96
    )


def test_a_replica_loads_what_the_plan_says(
    demo_model: Make, capsys: Capture, no_leaks: Path
) -> None:
    model = demo_model("llama")
    document = plan(capsys, model)
    with Replica(ReplicaOptions(str(model), copy=True, run_dir=str(no_leaks))) as replica:
        finish(replica, ask(replica, prompt_of(5), 2))
        replica.run_until(lambda: replica.loaded)
        assert replica.facts["weights_bytes"] == document["weights_bytes"]
        assert replica.board is not None
        assert replica.board.stages == len(document["stages"])
        assert replica.board.progress.done == document["read_bytes"]


def test_a_cached_model_will_be_mapped(demo_model: Make, capsys: Capture) -> None:
    model = demo_model("llama")
    for file in model.iterdir():
        file.read_bytes()
    document = plan(capsys, model)
    assert document["rate_bytes_per_s"] is None
    assert document["rate_source"] == "cached, mapped in place"
    assert document["predicted_load_s"] == 0
    assert document["predicted_ttft_s"] >= document["worker_start_s"] > 0.1


def test_the_table(demo_model: Make, capsys: Capture) -> None:
    model = demo_model("llama")
    document = plan(capsys, model, "--rate", "10MB/s", "--batch", 2)
    assert main(["plan", str(model), "--rate", "10MB/s", "--batch", "2"]) == 0
    table = capsys.readouterr().out
    rows = {line[:12].strip(): line[12:].split() for line in table.splitlines()}
    for stage in document["stages"]:
        assert rows[stage["name"]][:2] == human_bytes(stage["bytes"]).split()
    assert rows["kv"] == human_bytes(document["memory"]["kv"]).split()
    assert f"memory for 2 x {document['context']} tokens" in table


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_each_rank_reads_its_share(demo_model: Make, capsys: Capture, family: str) -> None:
    model = demo_model(family)
    assert plan(capsys, model, "--rate", "1MB/s")["ranks"] == []
    document = plan(capsys, model, "--rate", "1MB/s", "--tensor-parallel", 2)
    first, second = ranks = document["ranks"]
    weights = tensors(model)
    # Norms, and biases of what is cut by columns, are on both; all else is on one of them.
    both = {n for n in weights if "norm" in n or n.endswith(("o_proj.bias", "down_proj.bias"))}
    shared = sum(weights[name].nbytes for name in both)
    total = sum(tensor.nbytes for tensor in weights.values())
    assert first["weights_bytes"] + second["weights_bytes"] == total + shared
    for rank in ranks:
        assert rank["weights_bytes"] <= rank["read_bytes"] < document["read_bytes"]
    assert main(["plan", str(model), "--rate", "1MB/s", "--tensor-parallel", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    start = next(i for i, row in enumerate(rows) if row.startswith("rank "))
    for rank, row in zip(ranks, rows[start + 1 : start + 3], strict=True):
        sizes = [*human_bytes(rank["weights_bytes"]).split()]
        sizes += human_bytes(rank["read_bytes"]).split()
        assert row.split() == [str(rank["rank"]), *sizes, str(rank["extents"])]


def test_a_model_that_does_not_divide(demo_model: Make, capsys: Capture) -> None:
    assert main(["plan", str(demo_model("llama")), "--tensor-parallel", "7"]) == 1
    assert "coldframe: CheckpointError: a tensor does not divide over 7 ranks" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "wrong",
    [("--context", "0"), ("--context", "1000000"), ("--batch", "0"), ("--tensor-parallel", "0")],
)
def test_what_cannot_be_planned(demo_model: Make, capsys: Capture, wrong: tuple[str, str]) -> None:
    assert main(["plan", str(demo_model("llama")), *wrong]) == 1
    assert "coldframe: RequestError: " in capsys.readouterr().err


def test_a_bad_checkpoint_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", str(tmp_path / "nowhere")]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("coldframe: SourceNotFound: ")
