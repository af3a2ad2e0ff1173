"""Weights that come from elsewhere, held against those of vLLM's MODEL; without vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.checkpoints.slices import WHOLE, Rank
from coldframe.loader.errors import CheckpointError
from coldframe.loader.loads.placing import Placer
from coldframe.loader.sources.file import FileSource
from coldframe.runtime.cli import main
from coldframe.runtime.integrations.vllm import witness
from coldframe.runtime.integrations.vllm.witness import Witness

Make = Callable[..., Path]


class Arena:
    """A checkpoint that has come in."""

    def __init__(self, model: Path, layout: Layout = Layout.FILE, rank: Rank = WHOLE) -> None:
        checkpoint = Checkpoint.open(model)
        self.plan = Plan.build(checkpoint, layout=layout, rank=rank)
        self.memory = memoryview(bytearray(self.plan.arena_bytes))
        files = FileSource(checkpoint.shards)
        placer = Placer(files, self.memory)
        for stage in self.plan.stages:
            for extent in stage.extents:
                placer.fetch(extent, extent.file_offset, extent.file_offset + extent.length)
        files.close()

    def held_against(self, place: Path) -> None:
        found = Witness.of(str(place))
        assert found is not None
        placements = list(self.plan.placements.values())
        before = len(os.listdir("/proc/self/fd"))
        found.announce(placements)
        try:
            found.check(placements, lambda at, n: bytes(self.memory[at : at + n]))
        finally:
            found.close()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def copy(demo_model: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model("qwen2"), tmp_path / "copy"))


def change(model: Path, tensor: str, *, row: int) -> None:
    """Writes other numbers to the beginning of a row, where no length or header shows it."""
    checkpoint = Checkpoint.open(model)
    info = checkpoint.tensors[tensor]
    with Path(checkpoint.shards[info.shard].uri).open("r+b") as file:
        file.seek(info.offset + row * (info.nbytes // info.shape[0]))
        old = file.read(4)
        file.seek(-4, os.SEEK_CUR)
        file.write(bytes(byte ^ 0x11 for byte in old))


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        (Layout.FILE, WHOLE),
        (Layout.ALIGNED, WHOLE),
        (Layout.ALIGNED, Rank(0, 2)),
        (Layout.ALIGNED, Rank(1, 2)),
    ],
)
def test_the_same_weights_pass_and_a_fine_tune_does_not(
    demo_model: Make, copy: Path, layout: Layout, rank: Rank
) -> None:
    arena = Arena(demo_model("qwen2"), layout, rank)
    arena.held_against(demo_model("qwen2"))
    arena.held_against(copy)
    name = "model.layers.1.mlp.down_proj.weight"  # cut by columns: each rank has of all rows
    placement = arena.plan.placements[name]
    change(copy, name, row=placement.shape[0] // 2)
    if rank.index:  # the first columns are another's
        arena.held_against(copy)
        name = "model.norm.weight"
        change(copy, name, row=0)
    with pytest.raises(CheckpointError, match="not those of vLLM's MODEL") as caught:
        arena.held_against(copy)
    assert caught.value.where == f"{copy}, tensor {name}"
    assert "a directory without any" in str(caught.value)


def test_other_tensors_are_others(demo_model: Make) -> None:
    arena = Arena(demo_model("qwen2"))
    with pytest.raises(CheckpointError, match="got F32"):
        arena.held_against(demo_model("qwen2", "bfloat16"))
    with pytest.raises(CheckpointError, match="no such tensor"):
        arena.held_against(demo_model("llama"))


def test_a_seal_says_it_of_all_bytes(
    copy: Path, demo_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    unsealed = Witness.of(str(copy))
    assert unsealed is not None
    assert not unsealed.vouches_for(Arena(demo_model("qwen2")).plan)
    assert main(["seal", str(copy)]) == 0
    capsys.readouterr()
    sealed = Witness.of(str(copy))
    assert sealed is not None
    assert sealed.vouches_for(Arena(copy).plan)
    assert not sealed.vouches_for(Arena(demo_model("qwen2")).plan)


def test_who_has_no_weights_is_no_witness(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    warnings: list[object] = []
    monkeypatch.setattr(witness._log, "warning", lambda *words: warnings.append(words))
    for place in ("s3://bucket/model", "http://127.0.0.1:1/model", "org/name@v1", "no such//x"):
        assert Witness.of(place) is None
    shards = list(copy.glob("*.safetensors"))
    for shard in shards:
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert warnings == []
    assert Witness.of(str(copy)) is None  # which says why
    assert len(warnings) == 1
    for shard in shards:
        shard.unlink()
    assert Witness.of(str(copy)) is None
    assert len(warnings) == 1
