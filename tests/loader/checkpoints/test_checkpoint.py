from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from coldframe.loader.checkpoints.checkpoint import Checkpoint, Shard, read_generation_config
from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from tests.loader.checkpoints.written import (
    header_of,
    tensor,
    write_index,
    write_model,
    write_shard,
)

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_model(tmp_path / "single", [[tensor("a", 8)]])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "sharded", [[tensor("a", 8)], [tensor("b", 3), tensor("c", 5)]])


def refused(root: Path, kind: type[ColdframeError] = CheckpointError) -> ColdframeError:
    with pytest.raises(ColdframeError) as caught:
        Checkpoint.open(root)
    error = caught.value
    assert type(error) is kind
    assert error.where is not None
    assert str(root) in error.where
    assert error.hint
    return error


def test_a_single_file_opens(single: Path) -> None:
    path = single / "model.safetensors"
    status = path.stat()
    checkpoint = Checkpoint.open(single)
    assert checkpoint.path == str(single)
    assert checkpoint.config == {}
    info = checkpoint.tensors["a"]
    assert checkpoint.shards == (
        Shard(
            name="model.safetensors",
            uri=str(path),
            size=status.st_size,
            version=f"{status.st_mtime_ns}-{status.st_ino}-{status.st_dev}",
            data_offset=info.offset,
        ),
    )
    assert path.read_bytes()[info.offset :] == tensor("a", 8)[3]


def test_what_save_file_writes_opens_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shards = [
        {"x": torch.randn(3, 5), "y": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 2)},
        {"z": torch.randint(0, 9, (4, 1, 2)), "scalar": torch.tensor(1.5).half()},
    ]
    weight_map = {}
    for name, tensors in zip((ONE, TWO), shards, strict=True):
        save_file(tensors, tmp_path / name)
        weight_map.update(dict.fromkeys(tensors, name))
    write_index(tmp_path, weight_map)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.tensors.keys() == weight_map.keys()
    for number, name in enumerate((ONE, TWO)):
        assert checkpoint.shards[number].name == name
        raw = (tmp_path / name).read_bytes()
        with safe_open(tmp_path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                info = checkpoint.tensors[key]
                assert info.shard == number
                assert info.dtype == file.get_slice(key).get_dtype()
                assert list(info.shape) == file.get_slice(key).get_shape()
                expected = file.get_tensor(key).reshape(-1).view(torch.uint8).numpy().tobytes()
                assert raw[info.offset : info.offset + info.nbytes] == expected


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    shard = "model-00001-of-00001.safetensors"
    other = {k: v + 1 for k, v in LlamaForCausalLM(config).state_dict().items()}
    save_file(other, tmp_path / shard, metadata={"format": "pt"})
    write_index(tmp_path, dict.fromkeys(other, shard))

    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path)
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    info = checkpoint.tensors["model.norm.weight"]
    raw = Path(checkpoint.shards[0].uri).read_bytes()[info.offset : info.offset + info.nbytes]
    assert raw == loaded.model.norm.weight.detach().numpy().tobytes()


def test_files_that_the_index_does_not_name_are_ignored(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(b"anything")
    assert [shard.name for shard in Checkpoint.open(sharded).shards] == [ONE, TWO]


def test_shards_may_be_links_as_in_the_hugging_face_cache(sharded: Path) -> None:
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for name in (ONE, TWO, "config.json"):
        (sharded / name).rename(blobs / name[::-1])
        (sharded / name).symlink_to(Path("..", "blobs", name[::-1]))
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.tensors.keys() == {"a", "b", "c"}
    assert checkpoint.shards[0].uri == str(sharded / ONE)
    assert str((blobs / ONE[::-1]).stat().st_ino) in checkpoint.shards[0].version.split("-")


def test_the_fingerprint_is_of_the_content_not_of_the_place(sharded: Path, tmp_path: Path) -> None:
    fingerprint = Checkpoint.open(sharded).fingerprint
    assert len(fingerprint) == 64
    moved = sharded.rename(tmp_path / "moved")
    os.utime(moved / ONE, (1, 1))
    assert Checkpoint.open(moved).fingerprint == fingerprint

    (moved / "config.json").write_text('{"rope_theta": 1.0}')
    other_config = Checkpoint.open(moved).fingerprint
    (moved / "config.json").write_text("{}")
    write_shard(moved / ONE, header_of([("a", "I8", [8], bytes(8))]), bytes(8))
    other_dtype = Checkpoint.open(moved).fingerprint
    assert len({fingerprint, other_config, other_dtype}) == 3


# The directory and its config


def test_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", SourceNotFound)


def test_a_path_that_no_file_system_takes_is_an_error(tmp_path: Path) -> None:
    refused(tmp_path / "nul\0nul", SourceError)
    refused(tmp_path / ("x" * 5000), SourceError)


def test_a_file_is_not_a_model(single: Path) -> None:
    error = refused(single / "model.safetensors")
    assert (error.what, error.got) == ("the model is not a directory", "a file")
    refused(single / "model.safetensors" / "below", SourceNotFound)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_not_found(single: Path, name: str) -> None:
    (single / name).unlink()
    assert name in str(refused(single, SourceNotFound))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "this is not JSON"),
        ("{", "this is not JSON"),
        ("\x7b\x7d\x00", "this is not JSON"),
        ("[]", "this is not a JSON object"),
        ("null", "this is not a JSON object"),
        ('{"a": 1, "b": 2, "a": 1}', "a key appears twice"),
        ('{"a": {"b": 1, "b": 2}}', "a key appears twice"),
        ('{"a":' + "[" * 100_000, "the JSON is nested too deeply"),
    ],
)
def test_a_config_that_is_no_config_is_refused(single: Path, text: str, what: str) -> None:
    (single / "config.json").write_text(text)
    error = refused(single)
    assert error.what == what
    assert error.where == str(single / "config.json")


def test_a_config_of_other_bytes_is_refused(single: Path) -> None:
    (single / "config.json").write_bytes(b'{"a": "\xff"}')
    assert refused(single).what == "this is not JSON"


def test_a_config_may_hold_infinity(single: Path) -> None:
    (single / "config.json").write_text(json.dumps({"time_step_limit": [0.0, float("inf")]}))
    checkpoint = Checkpoint.open(single)
    assert checkpoint.config == {"time_step_limit": [0.0, float("inf")]}
    assert checkpoint.fingerprint


def test_a_generation_config_may_be_missing_but_not_broken(single: Path) -> None:
    path = single / "generation_config.json"
    assert read_generation_config(str(single)) == {}
    path.write_text('{"eos_token_id": [1, 2]}')
    assert read_generation_config(str(single)) == {"eos_token_id": [1, 2]}
    path.write_text('{"eos_token_id": [1, 2')
    with pytest.raises(CheckpointError, match="not JSON"):
        read_generation_config(str(single))
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(SourceNotFound):
        read_generation_config(str(single))


def test_a_config_too_large_is_refused_unread(single: Path) -> None:
    os.truncate(single / "config.json", 1 << 40)
    error = refused(single)
    assert (error.expected, error.got) == ("at most 10000000 bytes", f"{1 << 40} bytes")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_regular_file_is_refused_at_once(single: Path, name: str, kind: str) -> None:
    path = single / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    error = refused(single)
    assert error.what == "this is not a regular file"
    assert error.where == str(path)


@contextmanager
def _unprivileged() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_denied(
    single: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (single / name).chmod(0)
    single.chmod(0o755)
    # By a relative path: the directories above may be closed to an unprivileged user.
    monkeypatch.chdir(single)
    with _unprivileged(), pytest.raises(SourceDenied) as caught:
        Checkpoint.open(".")
    assert caught.value.where == os.path.join(".", name)
    assert caught.value.hint


# The index and its shards


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "this is not JSON"),
        ("[]", "this is not a JSON object"),
        ("{}", "the index has no weight_map"),
        ('{"weight_map": []}', "the index has no weight_map"),
        ('{"weight_map": {}}', "the index has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a key appears twice"),
        ('{"weight_map": {}, "weight_map": {}}', "a key appears twice"),
    ],
)
def test_an_index_that_is_no_index_is_refused(sharded: Path, text: str, what: str) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(text)
    error = refused(sharded)
    assert (error.what, error.where) == (what, str(path))


@pytest.mark.parametrize(
    "name",
    [
        "../single/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "model\0.safetensors",
        "..",
        ".",
        "",
        "pytorch_model.bin",
        1,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(
    single: Path, sharded: Path, name: object
) -> None:
    (sharded / "sub").mkdir()
    write_shard(sharded / "sub" / "model.safetensors", {})
    write_index(sharded, {"a": ONE, "b": name, "c": TWO})
    error = refused(sharded)
    assert error.what == "the index names something that is not a shard of this directory"
    assert "tensor 'b'" in str(error.where)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / TWO).unlink()
    assert refused(sharded, SourceNotFound).where == str(sharded / TWO)


def test_a_dangling_link_is_a_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to("../blobs/not-downloaded")
    assert refused(sharded, SourceNotFound).where == str(sharded / TWO)


def test_a_link_to_itself_is_an_error(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to(TWO)
    assert refused(sharded, SourceError).where == str(sharded / TWO)


def test_a_shard_name_too_long_for_any_file_is_an_error(sharded: Path) -> None:
    write_index(sharded, {"a": "x" * 5000 + ".safetensors"})
    refused(sharded, SourceError)


def test_a_tensor_that_the_index_names_and_no_shard_has(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": TWO, "c": TWO, "d": TWO})
    error = refused(sharded)
    assert "tensor 'd'" in str(error.where)
    assert (error.expected, error.got) == (TWO, "no such tensor in any shard")


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": ONE, "c": TWO})
    error = refused(sharded)
    assert "tensor 'b'" in str(error.where)
    assert (error.expected, error.got) == (ONE, TWO)


def test_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": TWO})
    error = refused(sharded)
    assert error.where == f"{sharded / TWO}, tensor 'c'"
    assert (error.expected, error.got) == ("2 tensors", "3 tensors")


def test_a_tensor_in_two_shards_names_both(sharded: Path) -> None:
    write_shard(sharded / TWO, header_of([tensor("a", 8)]), bytes(8))
    write_index(sharded, {"a": ONE, "b": TWO})
    error = refused(sharded)
    assert error.where == f"{sharded}, tensor 'a'"
    assert error.got == f"{ONE} and {TWO}"


@pytest.mark.parametrize("change", [-1, 1, -1000])
def test_a_shard_of_another_size_than_its_header_says(sharded: Path, change: int) -> None:
    path = sharded / TWO
    size = path.stat().st_size
    os.truncate(path, max(0, size + change))
    assert str(path) in str(refused(sharded).where)


def test_a_bad_checkpoint_leaves_no_file_open(sharded: Path) -> None:
    (sharded / TWO).write_bytes(b"")
    before = os.listdir("/proc/self/fd")
    refused(sharded)
    assert os.listdir("/proc/self/fd") == before


def test_opening_imports_nothing_heavy(sharded: Path) -> None:
    code = (
        "import sys; from coldframe.loader.checkpoints.checkpoint import Checkpoint;"
        "from coldframe.loader.checkpoints.plan import Plan;"
        "Plan.build(Checkpoint.open(sys.argv[1]));"
        "print(*sorted({'torch', 'numpy', 'safetensors', 'asyncio', 'ssl'} & sys.modules.keys()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, sharded], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []
