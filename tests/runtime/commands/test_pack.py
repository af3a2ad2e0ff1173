"""Packed models, read by safetensors, Transformers and a real replica."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.seal import SEAL_NAME
from coldframe.loader.errors import (
    CheckpointError,
    PlatformError,
    RequestError,
    SourceCorrupt,
)
from coldframe.runtime.cli import main
from coldframe.runtime.commands.pack import pack
from tests.loader.checkpoints.written import tensor, write_index, write_model
from tests.runtime.helpers import expected, prompt_of
from tests.support import unavailable

Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
COLDFRAME = str(Path(sys.executable).parent / "coldframe")


def tensors(model: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].shape == value.shape
        # Bit by bit: NaN is not equal to itself.
        bits = (found.reshape(-1).view(torch.uint8) for found in (value, after[name]))
        assert torch.equal(*bits)


def layout(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset in the file and size of each tensor, in the order of the file."""
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data])
    header.pop("__metadata__")
    spans = [
        (name, data + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    ]
    # The header's own order is that of the data.
    assert spans == sorted(spans, key=lambda span: span[1])
    assert data % 4096 == 0
    return spans


def assert_aligned(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        odd = False
        for _, offset, nbytes in layout(path):
            odd = odd or nbytes % 64 != 0
            assert odd == (nbytes % 64 != 0)  # the odd ones are last
            if not odd:
                assert offset % 64 == 0


def assert_sealed(model: Path, capsys: Capture) -> None:
    assert main(["seal", str(model), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_packed_model_is_the_same_model(
    demo_model: Make, tmp_path: Path, capsys: Capture, family: str
) -> None:
    source, target = demo_model(family), tmp_path / "packed"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["pack", str(source), str(target), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert_same_tensors(source, target)
    assert_aligned(target)
    assert_sealed(target, capsys)
    # Everything but the weights is there, byte for byte.
    weights = {name for name in before if ".safetensors" in name}
    kept = before.keys() - weights
    assert set(document["copied"]) == kept
    assert set(os.listdir(target)) == kept | {"model.safetensors", SEAL_NAME}
    for name in kept:
        assert (target / name).read_bytes() == before[name]
    assert document["files"] == [
        {"name": "model.safetensors", "bytes": (target / "model.safetensors").stat().st_size}
    ]
    assert document["bytes"] == sum(value.nbytes for value in tensors(source).values())
    assert (document["verified"], document["left_out"]) == (False, [])
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    one = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    other = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert os.listdir(tmp_path) == ["packed"]


@pytest.mark.parametrize("shard_size", [10**9, 700_000, 150_000])
def test_the_order_is_that_of_the_load(demo_model: Make, tmp_path: Path, shard_size: int) -> None:
    source, target = demo_model("qwen2"), tmp_path / "packed"
    document = pack(source, target, shard_size)
    assert_same_tensors(source, target)
    assert_aligned(target)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert [file["name"] for file in document["files"]] == files
    checkpoint = Checkpoint.open(target)
    assert [shard.name for shard in checkpoint.shards] == files
    stages = Plan.build(Checkpoint.open(source)).stages
    sizes = {stage.name: stage.nbytes for stage in stages}
    for name in files:
        # A file over the limit holds one tensor.
        spans = layout(target / name)
        assert sum(nbytes for _, _, nbytes in spans) <= shard_size or len(spans) == 1
    plan = Plan.build(checkpoint)
    for stage in plan.stages:
        whole = sizes[stage.name] <= shard_size
        assert len(stage.extents) == 1 or not whole
    extents = [extent for stage in plan.stages for extent in stage.extents]
    places = [(extent.shard, extent.file_offset) for extent in extents]
    assert places == sorted(places)
    if len(files) > 1:
        total = sum(value.nbytes for value in tensors(source).values())
        index = json.loads((target / "model.safetensors.index.json").read_bytes())
        assert index["metadata"] == {"total_size": total}
        model = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
        reference = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
        assert all(model[name].equal(reference[name]) for name in reference)


def test_what_runs_as_one_lies_together(demo_model: Make, tmp_path: Path) -> None:
    pack(demo_model("qwen2"), tmp_path / "packed")
    names = [name for name, _, _ in layout(tmp_path / "packed" / "model.safetensors")]
    layers = {name.split(".")[2] for name in names if ".layers." in name}
    for layer in layers:
        attention = f"model.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            first = names.index(f"{attention}.q_proj.{kind}")
            group = names[first : first + 3]
            assert group == [f"{attention}.{part}_proj.{kind}" for part in "qkv"]
        gate = names.index(f"model.layers.{layer}.mlp.gate_proj.weight")
        assert names[gate + 1] == f"model.layers.{layer}.mlp.up_proj.weight"


def test_odd_sizes_and_every_dtype(tmp_path: Path, capsys: Capture) -> None:
    dtypes = [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16,
        torch.int32, torch.float32, torch.float64, torch.int64, torch.float8_e4m3fn,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text("{}")
    values = {}
    shapes = [(3,), (0, 4), (), (64,), (5, 7), (33, 64)]
    for number, (dtype, shape) in enumerate((d, s) for d in dtypes for s in shapes):
        bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator)
        raw = bits.to(torch.uint8) & (1 if dtype is torch.bool else 255)
        values[f"model.layers.{number % 3}.t{number}"] = raw.view(dtype).reshape(shape)
    values["model.layers.0.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(values, source / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    pack(source, tmp_path / "packed", 3000)
    assert_same_tensors(source, tmp_path / "packed")
    assert_aligned(tmp_path / "packed")
    assert_sealed(tmp_path / "packed", capsys)
    itemsize = {name: value.dtype.itemsize for name, value in values.items()}
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(files) > 3
    for path in files:
        # The odd ones, too, begin where their elements may.
        assert all(offset % itemsize[name] == 0 for name, offset, _ in layout(path))
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}
    # What no model reads comes last.
    assert layout(files[-1])[-1][0] == "model.layers.0.rotary_emb.inv_freq"


def test_large_tensors_are_hashed_and_copied_in_pieces(tmp_path: Path, capsys: Capture) -> None:
    data = random.Random(3).randbytes(20_000_003)
    big = ("model.layers.0.a", "U8", [len(data)], data)
    small = tensor("model.embed.b", 100)
    source = write_model(tmp_path / "m", [[big, small]])
    assert main(["seal", str(source)]) == 0
    capsys.readouterr()
    document = pack(source, tmp_path / "packed")
    assert document["verified"]
    assert_same_tensors(source, tmp_path / "packed")
    assert_sealed(tmp_path / "packed", capsys)


def test_a_model_that_is_packed_again_stays_as_it_is(demo_model: Make, tmp_path: Path) -> None:
    one = pack(demo_model("llama"), tmp_path / "one", 400_000)
    again = pack(tmp_path / "one", tmp_path / "two", 400_000)
    assert again["verified"]
    assert again["digest"] == one["digest"]
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_what_is_copied_and_what_is_not(tmp_path: Path, capsys: Capture) -> None:
    shards = [[tensor("model.layers.0.a", 64)], [tensor("lm_head.b", 64)]]
    source = write_model(tmp_path / "m", shards)
    (source / "README.md").write_text("# A model")
    (source / ".gitattributes").write_text("x")
    (source / "licence").symlink_to(tmp_path / "the licence")
    (tmp_path / "the licence").write_text("do as you like")
    (source / "dangling").symlink_to("nowhere")
    (source / "consolidated.safetensors").write_bytes(b"another copy")
    (source / "model-00009-of-00009.safetensors").write_bytes(b"from an older save")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_text("x")
    os.mkfifo(source / "pipe")
    (source / SEAL_NAME).write_text("{}")
    assert main(["seal", str(source)]) == 0
    capsys.readouterr()
    assert main(["pack", str(source), str(tmp_path / "packed")]) == 0
    out = capsys.readouterr().out
    left_out = [
        "consolidated.safetensors", "dangling", "model-00009-of-00009.safetensors", "onnx", "pipe",
    ]  # fmt: skip
    assert f"left out: {', '.join(left_out)}\n" in out
    assert sorted(os.listdir(tmp_path / "packed")) == sorted(
        [".gitattributes", "README.md", "config.json", "licence", "model.safetensors", SEAL_NAME]
    )
    assert not (tmp_path / "packed" / "licence").is_symlink()
    assert (tmp_path / "packed" / "licence").read_text() == "do as you like"


def test_metadata_that_contradicts_itself(tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text("{}")
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name, key in zip(names, "ab", strict=True):
        save_file({key: torch.ones(1)}, source / name, metadata={"format": "pt", "by": key})
    write_index(source, dict(zip("ab", names, strict=True)))
    with pytest.raises(CheckpointError, match="contradict") as caught:
        pack(source, tmp_path / "packed")
    assert (caught.value.expected, caught.value.got) == ("'a'", "'b'")
    assert os.listdir(tmp_path) == ["m"]


# -- what cannot be packed --------------------------------------------------------------------


def test_a_place_that_is_taken(demo_model: Make, tmp_path: Path) -> None:
    source = demo_model("llama")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for name in ("file", "full"):
        with pytest.raises(RequestError, match="something in place") as caught:
            pack(source, tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
    with pytest.raises(RequestError, match="something in place"):
        pack(source, source)
    with pytest.raises(PlatformError, match="cannot be written"):
        pack(source, tmp_path / "file" / "below")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_places_that_are_free(demo_model: Make, tmp_path: Path) -> None:
    source = demo_model("llama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("linked")
    for name in ("empty", "link", "deep/er"):
        pack(source, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()
    inside = Path(shutil.copytree(source, tmp_path / "m"))
    assert pack(inside, inside / "packed")["left_out"] == []
    assert_same_tensors(source, inside / "packed")


def test_a_source_that_is_not_what_was_sealed(
    demo_model: Make, tmp_path: Path, capsys: Capture
) -> None:
    source = Path(shutil.copytree(demo_model("llama"), tmp_path / "m"))
    assert main(["seal", str(source)]) == 0
    found = Checkpoint.open(source).tensors["model.layers.1.mlp.up_proj.weight"]
    path = source / Checkpoint.open(source).shards[found.shard].name
    data = bytearray(path.read_bytes())
    data[found.offset + 1] ^= 16
    path.write_bytes(data)
    with pytest.raises(SourceCorrupt, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        pack(source, tmp_path / "packed")
    assert os.listdir(tmp_path) == ["m"]
    config = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(config + b" ")
    with pytest.raises(SourceCorrupt, match="config"):
        pack(source, tmp_path / "packed")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    source = write_model(tmp_path / "m", [[tensor("lm_head.weight", 64)]])
    with (source / "large.bin").open("wb") as file:
        file.truncate(2 << 30)  # takes a while to copy
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from coldframe.runtime.cli import main\n"
        "sys.exit(main(['pack', *sys.argv[1:]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(tmp_path / "packed")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            deadline = time.monotonic() + 30
            while len(os.listdir(tmp_path)) == 1:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(how)
            out, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + how
    assert (out, error) == ("", "")
    assert os.listdir(tmp_path) == ["m"]


# A tmpfs of its own, in a mount namespace of its own: a disk that is really full.
@pytest.mark.heavy
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param("size=1M", id="too small from the start"),
        pytest.param("size=64M,nr_inodes=5", id="full while writing"),
    ],
)
def test_a_full_disk(demo_model: Make, tmp_path: Path, limit: str) -> None:
    if shutil.which("unshare") is None:
        unavailable("there is no unshare command")
    script = (
        f'mount -t tmpfs -o {limit} tmpfs "$1" || exit 99; "$2" pack "$3" "$1/packed"; code=$?; '
        'ls -A "$1"; exit $code'
    )
    source = demo_model("llama", size="small") if limit == "size=1M" else demo_model("llama")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), COLDFRAME, str(source)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        unavailable(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("coldframe: PlatformError: there is not enough disk space")


# -- and it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--copy"]], ids=["mapped", "copied"])
def test_a_packed_model_answers_as_before(
    demo_model: Make, tmp_path: Path, no_leaks: Path, how: list[str]
) -> None:
    source, target = demo_model("qwen3"), tmp_path / "packed"
    pack(source, target, 400_000)
    prompt = prompt_of(17)
    ids = ",".join(map(str, prompt))
    done = subprocess.run(
        [COLDFRAME, "run", target, "--prompt-ids", ids, "-n", "12", "--ignore-eos", "--json", *how],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["token_ids"] == expected(source, tuple(prompt), 12)
