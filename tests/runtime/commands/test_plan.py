"""What `coldframe plan` says, against the files, Transformers and a replica that really starts."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.runtime.cli import main
from coldframe.runtime.machine import probe
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.units import human_bytes
from tests.loader.peers.peer import TOKEN, serving
from tests.loader.web.hub_server import FakeHub, Repo
from tests.loader.web.moto_server import KEY, SECRET, isolate, moto, upload
from tests.loader.web.reader_kit import nothing_left
from tests.loader.web.servers import Fault, FaultProxy, Request, nginx
from tests.runtime.helpers import ask, finish, prompt_of

Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts are rehearsed in `planning/`."""
    monkeypatch.setenv("COLDFRAME_NO_REHEARSAL", "1")


def plan(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def read_but_a_page(path: Path) -> None:
    """Has a file in the page cache, page by page, without one in its middle."""
    step = mmap.PAGESIZE
    with path.open("r+b", buffering=0) as file:
        fd, size = file.fileno(), path.stat().st_size
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        middle = size // 2 // step * step
        # A single page cannot always be dropped, nor can one that somebody looks at just then.
        for _ in range(100):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_bytes(fd, 0, size):
                break
            time.sleep(0.05)
        for offset in range(0, size, step):
            if offset != middle:
                os.pread(fd, step, offset)


def residency(files: list[Path]) -> tuple[int, int]:
    """Bytes of files that are in the page cache, and all of them."""
    cached = total = 0
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            cached, total = cached + cached_bytes(file.fileno(), 0, size), total + size
    return cached, total


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


@pytest.mark.heavy
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


@pytest.mark.heavy
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


def test_a_cached_model_will_be_mapped(demo_model: Make, capsys: Capture, tmp_path: Path) -> None:
    # One of its own: no page can be dropped of a file that another test has mapped.
    model = shutil.copytree(demo_model("llama"), tmp_path / "model")
    shards = [Path(shard.uri) for shard in Checkpoint.open(model).shards]
    for shard in shards:
        read_but_a_page(shard)
    # A page that the kernel has dropped is no matter: a load would map them all the same.
    cached, total = residency(shards)
    assert 0.9 * total < cached < total
    document = plan(capsys, model)
    # And what is there is left there.
    assert residency(shards)[0] > 0.9 * total
    assert document["rate_bytes_per_s"] is None
    assert document["rate_source"] == "cached, mapped in place"
    assert document["predicted_load_s"] == 0
    assert document["predicted_ttft_s"] >= document["worker_start_s"] > 0.1


@pytest.mark.heavy
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


@pytest.mark.heavy
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
    [
        ("--context", "0"),
        ("--context", "1000000"),
        ("--batch", "0"),
        ("--tensor-parallel", "0"),
        ("--prompt-tokens", "0"),
        ("--prompt-tokens", "1000000"),
        ("--rehearsals", "0"),
        ("--rehearsals", "6"),
        ("--device", "tpu"),
        ("--device", "cpu,tpu"),
        ("--node", "ftp://hole"),
        ("--nodes", "/nowhere/nodes.json"),
    ],
)
def test_what_cannot_be_planned(demo_model: Make, capsys: Capture, wrong: tuple[str, str]) -> None:
    assert main(["plan", str(demo_model("llama")), *wrong]) == 1
    assert "coldframe: RequestError: " in capsys.readouterr().err


def test_a_bad_checkpoint_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", str(tmp_path / "nowhere")]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("coldframe: SourceNotFound: ")


# -- GPUs --------------------------------------------------------------------------------------

GIB = 1 << 30


def with_gpu(patch: pytest.MonkeyPatch, **more: object) -> None:
    """A driver's process that tells of one GPU."""
    gpu = {"device": "cuda:0", "name": "A GPU", "error": None, "free": 79 * GIB, "total": 80 * GIB}
    told = json.dumps({"error": None, "gpus": [{**gpu, **more}]}).encode()
    patch.setattr("coldframe.runtime.planning.target.ENTRY", f"import os; os.write(3, {told!r})")


def test_on_a_gpu_its_memory_counts(
    demo_model: Make, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch)
    monkeypatch.setattr("coldframe.runtime.commands.plan._worker_start_s", lambda: 1.0)
    model = demo_model("llama")
    document = plan(capsys, model, "--device", "cuda", "--rate", "10MB/s")
    assert (document["device"], document["gpu"], document["layout"]) == (
        "cuda:0",
        "A GPU",
        "aligned",
    )
    assert document["memory"]["available"] == 79 * GIB
    assert document["memory"]["overhead"] == 3 * GIB // 2
    # What nobody has, less weights, a tenth for what comes, and two workers' contexts.
    left = 79 * GIB - 8 * GIB - GIB - document["memory"]["weights"]
    assert document["kv_default"] == pytest.approx(left, abs=1)


@pytest.mark.heavy
def test_the_table_of_a_gpu(
    demo_model: Make, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch)
    model = demo_model("llama")
    assert main(["plan", str(model), "--device", "cuda", "--rate", "10MB/s"]) == 0
    table = capsys.readouterr().out
    assert "device cuda:0, A GPU" in table
    assert "the link to the GPU is not in it" in table


def test_a_gpu_that_is_not_there_is_an_error(
    demo_model: Make, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(demo_model("llama"))
    with_gpu(monkeypatch)
    assert main(["plan", model, "--device", "cuda:1"]) == 1
    assert "coldframe: NoDevice: there is no such GPU, in cuda:1" in capsys.readouterr().err
    lost = {"error": "DeviceLost", "what": "it broke", "got": "CUDA_ERROR_ECC_UNCORRECTABLE"}
    with_gpu(monkeypatch, error=lost)
    assert main(["plan", model, "--device", "cuda:0"]) == 1
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["plan", model, "--device", "cuda"]) == 1
    assert "coldframe: NoDevice: " in capsys.readouterr().err


# -- models that are elsewhere ----------------------------------------------------------------


Patch = pytest.MonkeyPatch


@contextmanager
def on_http(model: Path, patch: Patch) -> Iterator[str]:
    with nginx(model.parent) as base:
        yield f"http://me:hunter2secret@{base.removeprefix('http://')}/{model.name}"


@contextmanager
def on_s3(model: Path, patch: Patch) -> Iterator[str]:
    with moto() as url:
        isolate(patch, model.parent / "nowhere", url)
        client = botocore.session.get_session().create_client("s3")
        upload(client, model, "models", "m/", ChecksumAlgorithm="CRC64NVME")
        client.close()
        yield "s3://models/m"


@contextmanager
def on_hub(model: Path, patch: Patch) -> Iterator[str]:
    with FakeHub() as hub:
        hub.repos["org/name"] = Repo()
        hub.repos["org/name"].push({path.name: path.read_bytes() for path in model.iterdir()})
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_CACHE", str(model.parent / "nowhere"))
        yield "org/name@main"


@contextmanager
def on_a_peer(model: Path, patch: Patch) -> Iterator[str]:
    with serving(model) as peer:
        patch.setenv("COLDFRAME_PEER_TOKEN", TOKEN)
        yield f"peer://{peer.host}:{peer.port}"


@pytest.mark.heavy
@pytest.mark.parametrize("place", [on_http, on_s3, on_hub, on_a_peer])
def test_a_model_that_is_elsewhere(
    place: Callable[[Path, Patch], Any],
    demo_model: Make,
    capsys: Capture,
    monkeypatch: Patch,
) -> None:
    model = demo_model("llama")
    # As such a model is loaded.
    expected = Plan.build(Checkpoint.open(model), layout=Layout.ALIGNED)
    with place(model, monkeypatch) as uri:
        with nothing_left():
            document = plan(capsys, uri)
        assert main(["plan", uri, "--rate", "1MB/s"]) == 0
        table = capsys.readouterr().out
    assert document["layout"] == "aligned"
    assert document["plan_hash"] == expected.hash
    assert [stage["bytes"] for stage in document["stages"]] == [s.nbytes for s in expected.stages]
    assert document["memory"]["weights"] == expected.arena_bytes
    assert document["rate_source"] == "probed"
    rate = document["rate_bytes_per_s"]
    assert document["predicted_load_s"] == pytest.approx(document["read_bytes"] / rate)
    for secret in ("hunter2secret", KEY, SECRET, TOKEN):
        assert secret not in table + json.dumps(document)
    assert f"({human_bytes(1e6)}/s, given)" in table


@pytest.mark.heavy
def test_the_rate_is_that_of_the_source(demo_model: Make, capsys: Capture) -> None:
    model = demo_model("llama")
    size, pause = 16 << 10, 0.05

    def script(request: Request) -> Fault | None:
        return Fault(trickle=(size, pause)) if "if-match" in request.headers else None

    with nginx(model.parent) as base, FaultProxy(base, script) as proxy:
        document = plan(capsys, f"{proxy.url}/{model.name}")
    # Each connection carries so much, and the pause behind an answer's last piece is not felt.
    assert 0 < document["rate_bytes_per_s"] < 2 * 8 * size / pause


@pytest.mark.heavy
def test_a_source_that_gives_nothing(demo_model: Make, capsys: Capture, monkeypatch: Patch) -> None:
    model = demo_model("llama")
    monkeypatch.setattr(probe, "_LATEST_S", 0.3)

    def script(request: Request) -> Fault | None:
        return Fault(stall_after=0) if "if-match" in request.headers else None

    with nothing_left(), nginx(model.parent) as base, FaultProxy(base, script) as proxy:
        uri = f"{proxy.url}/{model.name}"
        assert main(["plan", uri]) == 1
        error = capsys.readouterr().err
        assert error.startswith("coldframe: SourceUnreachable: ")
        assert uri in error
        assert "--rate" in error
        assert plan(capsys, uri, "--rate", "1MB/s")["rate_source"] == "given"


def test_what_is_no_model_says_what_one_is(capsys: Capture) -> None:
    assert main(["plan", "no-such-model"]) == 1
    assert "s3://bucket/prefix" in capsys.readouterr().err
    assert main(["plan", "gopher://hole"]) == 1
    assert "s3://bucket/prefix" in capsys.readouterr().err
