"""`coldframe seal` and its check, on real files that are really damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.seal import SEAL_NAME, Seal
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.runtime.cli import main
from tests.support import unavailable

Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def seal(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, Any]:
    assert main(["seal", *map(str, arguments), "--json"]) == code
    out, error = capsys.readouterr()
    assert error == ""
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.fixture
def model(demo_model: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model("llama"), tmp_path / "m"))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_sealed_and_checked(model: Path, capsys: Capture) -> None:
    document = seal(capsys, model)
    written = Seal.read(DirectoryOrigin(str(model)))
    assert written is not None
    assert document["seal"] == str(model / SEAL_NAME)
    assert document["digest"] == written.digest
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    assert document["bytes"] == total
    checked = seal(capsys, model, "--check")
    assert checked["ok"]
    assert checked["bad"] == []
    assert checked["digest"] == document["digest"]


def test_the_text(model: Path, capsys: Capture) -> None:
    assert main(["seal", str(model)]) == 0
    assert capsys.readouterr().out.startswith(f"{model / SEAL_NAME}: written, digest ")
    assert main(["seal", str(model), "--check"]) == 0
    assert capsys.readouterr().out.startswith(f"{model}: as it was sealed, digest ")
    checkpoint = Checkpoint.open(model)
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = checkpoint.tensors[name]
    file = checkpoint.shards[tensor.shard]
    flip(model / file.name, tensor.offset)
    assert main(["seal", str(model), "--check"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{model}: not as it was sealed (")
    assert second.startswith(f"  {file.name}, tensor {name}, bytes {tensor.offset} to ")


def test_every_bad_tensor_is_named(model: Path, capsys: Capture) -> None:
    seal(capsys, model)
    checkpoint = Checkpoint.open(model)
    names = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
    tensors = [checkpoint.tensors[name] for name in names]
    spots = []
    for tensor in tensors:
        # At both ends: what is flipped between two pieces that are whole.
        spots += [(tensor, tensor.offset), (tensor, tensor.offset + tensor.nbytes - 1)]
    for tensor, at in spots:
        flip(model / checkpoint.shards[tensor.shard].name, at)
    document = seal(capsys, model, "--check", code=1)
    assert not document["ok"]
    found = {entry["tensor"]: entry for entry in document["bad"]}
    assert set(found) == set(names)
    for tensor, at in spots:
        entry = found[tensor.name]
        assert entry["file"] == checkpoint.shards[tensor.shard].name
        assert any(start <= at < stop for start, stop in entry["ranges"])
        for start, stop in entry["ranges"]:
            assert tensor.offset <= start < stop <= tensor.offset + tensor.nbytes
    # What was changed on purpose is sealed again.
    seal(capsys, model)
    assert seal(capsys, model, "--check")["ok"]


def test_a_config_or_header_that_was_changed(model: Path, capsys: Capture) -> None:
    seal(capsys, model)
    config = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(config + b"\n")
    document = seal(capsys, model, "--check", code=1)
    assert document["bad"] == [{"file": "config.json", "tensor": None, "ranges": []}]
    (model / "config.json").write_bytes(config)
    shard = Checkpoint.open(model).shards[0]
    raw = (model / shard.name).read_bytes()
    # What no tensor's bytes depend on is sealed, too.
    (model / shard.name).write_bytes(raw.replace(b'"pt"', b'"PT"', 1))
    document = seal(capsys, model, "--check", code=1)
    assert document["bad"] == [
        {"file": shard.name, "tensor": None, "ranges": [[0, shard.data_offset]]}
    ]


def test_errors(model: Path, capsys: Capture, tmp_path: Path) -> None:
    def fails(kind: str, *arguments: object) -> str:
        assert main(["seal", *map(str, arguments)]) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith(f"coldframe: {kind}: ")
        return error

    assert "coldframe seal MODEL" in fails("SourceNotFound", model, "--check")
    fails("SourceNotFound", tmp_path / "nowhere")
    assert "not on this machine" in fails("RequestError", "s3://bucket/prefix")
    seal(capsys, model)
    shard = min(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    fails("CheckpointError", model)


def test_a_model_with_more_or_fewer_bytes(model: Path, capsys: Capture, demo_model: Make) -> None:
    seal(capsys, model)
    shutil.copy(model / SEAL_NAME, model.parent)
    other = Path(shutil.copytree(demo_model("qwen3"), model.parent / "other"))
    shutil.copy(model.parent / SEAL_NAME, other)
    assert main(["seal", str(other), "--check"]) == 1
    assert "sealed before it was changed" in capsys.readouterr().err
    assert seal(capsys, other)["digest"]
    assert seal(capsys, other, "--check")["ok"]


def test_a_folder_that_may_not_be_written(model: Path) -> None:
    if shutil.which("unshare") is None:
        unavailable("there is no unshare command")
    script = (
        'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 99; exec "$2" seal "$1"'
    )
    coldframe = str(Path(sys.executable).parent / "coldframe")
    before = sorted(os.listdir(model))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(model), coldframe],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        unavailable(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert done.stderr.startswith("coldframe: PlatformError: the seal cannot be written, in ")
    assert sorted(os.listdir(model)) == before
