"""Slices of each rank, against safetensors' own slicing of the same files."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.extents import MAX_ROWS
from coldframe.loader.checkpoints.header import DTYPE_BITS
from coldframe.loader.checkpoints.plan import MAX_GAP, Layout, Plan, Rank
from coldframe.loader.errors import CheckpointError, ColdframeError
from coldframe.loader.loads.placing import Placer
from coldframe.loader.sources.file import FileSource
from tests.loader.checkpoints.written import Tensor, write_model, write_shard
from tests.loader.weights import shard_files

KIB = 1 << 10
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}


@dataclass(frozen=True)
class Shape:
    """A dense model's dimensions."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    hidden: int = 6
    inner: int = 8
    vocab: int = 10

    @property
    def config(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
        }

    @property
    def tensors(self) -> dict[str, list[int]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm.weight": [self.hidden],
            "self_attn.q_proj.weight": [q, self.hidden],
            "self_attn.q_proj.bias": [q],
            "self_attn.k_proj.weight": [kv, self.hidden],
            "self_attn.k_proj.bias": [kv],
            "self_attn.v_proj.weight": [kv, self.hidden],
            "self_attn.v_proj.bias": [kv],
            "self_attn.q_norm.weight": [self.head_dim],
            "self_attn.o_proj.weight": [self.hidden, q],
            "self_attn.o_proj.bias": [self.hidden],
            "mlp.gate_proj.weight": [self.inner, self.hidden],
            "mlp.gate_proj.bias": [self.inner],
            "mlp.up_proj.weight": [self.inner, self.hidden],
            "mlp.down_proj.weight": [self.hidden, self.inner],
            "mlp.down_proj.bias": [self.hidden],
            "mlp.experts.0.up_proj.weight": [self.inner, self.hidden],
        }
        return {
            "model.embed_tokens.weight": [self.vocab, self.hidden],
            **{
                f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()
            },
            "model.norm.weight": [self.hidden],
            "lm_head.weight": [self.vocab, self.hidden],
        }


def write(
    root: Path,
    shape: Shape,
    *,
    dtype: str = "BF16",
    shards: int = 1,
    seed: int | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A model of random bytes, in the order of its layers or, with a seed, in any."""
    dice = random.Random(seed or 0)
    tensors: list[Tensor] = [
        (name, dtype, dims, dice.randbytes(prod(dims) * DTYPE_BITS[dtype] // 8))
        for name, dims in shape.tensors.items()
    ]
    if seed is not None:
        dice.shuffle(tensors)
    files = [tensors[i::shards] for i in range(shards)]
    return write_model(root, files, shape.config if config is None else config)


def plan_of(root: Path, index: int, ranks: int, **how: Any) -> Plan:
    return Plan.build(Checkpoint.open(root), layout=Layout.ALIGNED, rank=Rank(index, ranks), **how)


class Counted:
    """A source that counts what it is asked for."""

    def __init__(self, inner: FileSource) -> None:
        self.inner = inner
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        self.bytes += sum(map(len, parts))
        self.inner.read_into(shard, offset, parts)


def load(root: Path, plan: Plan, chunk: int = 1 << 30) -> tuple[dict[str, torch.Tensor], int]:
    """What a rank then has in its arena, and how many bytes it read for that."""
    arena = bytearray(plan.arena_bytes)
    source = Counted(FileSource(Checkpoint.open(root).shards))
    placer = Placer(source, memoryview(arena))
    for stage in plan.stages:
        for extent in stage.extents:
            end = extent.file_offset + extent.length
            for start in range(extent.file_offset, end, chunk):
                placer.fetch(extent, start, min(end, start + chunk))
    source.close()
    found = {}
    for p in plan.placements.values():
        assert p.nbytes == prod(p.shape) * DTYPE_BITS[p.dtype] // 8
        assert p.arena_offset + p.nbytes <= plan.arena_bytes
        data = arena[p.arena_offset : p.arena_offset + p.nbytes]
        flat = torch.frombuffer(data, dtype=TORCH[p.dtype]) if data else torch.empty(0)
        found[p.name] = flat.to(TORCH[p.dtype]).reshape(p.shape)
    return found, source.bytes


def share(name: str, shape: Shape, rank: int, ranks: int) -> tuple[slice, ...]:
    """The rows and columns of a rank, written down as the literature has them."""

    def part(size: int) -> slice:
        return slice(rank * size // ranks, (rank + 1) * size // ranks)

    def scaled(heads: slice) -> slice:
        return slice(heads.start * shape.head_dim, heads.stop * shape.head_dim)

    match name.split(".")[-3:]:
        case [_, "q_proj", _]:
            return (scaled(part(shape.heads)),)
        case [_, "k_proj" | "v_proj", _] if ranks > shape.kv_heads:
            head = rank * shape.kv_heads // ranks
            return (scaled(slice(head, head + 1)),)
        case [_, "k_proj" | "v_proj", _]:
            return (scaled(part(shape.kv_heads)),)
        case ["mlp", "gate_proj" | "up_proj", _]:
            return (part(shape.inner),)
        case ["self_attn", "o_proj", "weight"]:
            return (slice(None), scaled(part(shape.heads)))
        case ["mlp", "down_proj", "weight"]:
            return (slice(None), part(shape.inner))
        case [*_, "embed_tokens" | "lm_head", "weight"]:
            rows = part(-(-shape.vocab // 64) * 64)
            return (slice(min(rows.start, shape.vocab), min(rows.stop, shape.vocab)),)
    return ()


def expected(root: Path, shape: Shape, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    found = {}
    for path in shard_files(root):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                where = share(name, shape, rank, ranks)
                found[name] = file.get_slice(name)[where] if where else file.get_tensor(name)
    return found


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit; random bytes make NaNs, which equal nothing."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and bytes(left.contiguous().view(-1).view(torch.uint8).numpy())
        == bytes(right.contiguous().view(-1).view(torch.uint8).numpy())
    )


@st.composite
def divided(draw: st.DrawFn) -> tuple[Shape, int]:
    """A model and a number of ranks that it divides over."""
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    shape = Shape(
        heads=max(ranks, kv_heads) * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 5)),
        inner=ranks * draw(st.integers(1, 3)),
        vocab=draw(st.integers(1, 200)),
    )
    return shape, ranks


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    model=divided(),
    dtype=st.sampled_from(sorted(TORCH)),
    shards=st.integers(1, 3),
    max_gap=st.sampled_from([0, 1, 7, 30, MAX_GAP]),
    chunk=st.sampled_from([1 << 30, 97, 13]),
    seed=st.integers(0, 1 << 16),
)
def test_each_rank_has_its_slices_and_all_ranks_together_the_model(
    model: tuple[Shape, int], dtype: str, shards: int, max_gap: int, chunk: int, seed: int
) -> None:
    shape, ranks = model
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder), shape, dtype=dtype, shards=shards, seed=seed)
        slices = []
        for rank in range(ranks):
            plan = plan_of(root, rank, ranks, max_gap=max_gap)
            found, read = load(root, plan, chunk)
            wanted = expected(root, shape, rank, ranks)
            assert found.keys() == wanted.keys()
            assert [name for name in wanted if not same(found[name], wanted[name])] == []
            assert read == plan.read_bytes
            assert plan.weights_bytes == sum(tensor.nbytes for tensor in wanted.values())
            assert plan.weights_bytes <= read <= plan.weights_bytes + _gaps(plan, max_gap)
            slices.append(found)
        whole = expected(root, shape, 0, 1)
    for name, tensor in whole.items():
        parts = [found[name] for found in slices]
        where = share(name, shape, 0, ranks)
        if "k_proj" in name or "v_proj" in name:
            # Ranks beyond the number of KV heads hold one that a neighbour has too.
            parts = parts[:: max(1, ranks // shape.kv_heads)]
        assert same(torch.cat(parts, len(where) - 1) if where else parts[-1], tensor)


def _gaps(plan: Plan, max_gap: int) -> int:
    """The bytes between what is wanted; none of those gaps is too wide, none is at an end."""
    total = 0
    for stage in plan.stages:
        for extent in stage.extents:
            rows = [
                (run.offset + row * run.stride, run.offset + row * run.stride + run.length)
                for run in extent.runs
                for row in range(run.count)
            ]
            assert rows == sorted(rows)
            assert (rows[0][0], rows[-1][1]) == (0, extent.length)
            gaps = [after[0] - before[1] for before, after in itertools.pairwise(rows)]
            assert all(0 <= gap <= max_gap for gap in gaps)
            total += sum(gaps)
    return total


def test_slices_that_touch_in_file_and_arena_stay_apart_where_one_is_strided(
    tmp_path: Path,
) -> None:
    # All sizes are multiples of 256, and rank 0's columns begin right behind the rows before them.
    shape = Shape(heads=2, kv_heads=2, head_dim=64, hidden=256, inner=512, vocab=64)
    root = write(tmp_path, shape)
    for rank in range(2):
        plan = plan_of(root, rank, 2)
        found, read = load(root, plan, 10_000)
        wanted = expected(root, shape, rank, 2)
        assert [name for name in wanted if not same(found[name], wanted[name])] == []
        assert read == plan.weights_bytes + _gaps(plan, MAX_GAP)


def test_slices_do_not_overlap_and_those_that_run_as_one_are_adjacent(tmp_path: Path) -> None:
    root = write(tmp_path, Shape(vocab=131))
    for rank in range(2):
        plan = plan_of(root, rank, 2)
        places = sorted((p.arena_offset, p.nbytes) for p in plan.placements.values())
        for (place, size), (after, _) in itertools.pairwise(places):
            assert place + size <= after
        attention = "model.layers.0.self_attn."
        q, k, v = (plan.placements[f"{attention}{name}_proj.weight"] for name in "qkv")
        assert (q.arena_offset + q.nbytes, k.arena_offset + k.nbytes) == (
            k.arena_offset,
            v.arena_offset,
        )


# What is read


def wide(root: Path, rows: int, columns: int) -> tuple[Path, int]:
    """A model whose down_proj is as large as that, without its bytes, and where they would be."""
    name = "model.layers.0.mlp.down_proj.weight"
    header = {name: {"dtype": "U8", "shape": [rows, columns], "data_offsets": [0, rows * columns]}}
    (root / "config.json").write_text("{}")
    path = root / "model.safetensors"
    write_shard(path, header)
    data = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(data + rows * columns)
    return root, data


def test_columns_with_narrow_gaps_are_one_read(tmp_path: Path) -> None:
    rows, columns = 5, 128 * KIB
    root, data = wide(tmp_path, rows, columns)
    plan = plan_of(root, 1, 2)
    (extent,) = plan.stages[1].extents
    (run,) = extent.runs
    assert extent.file_offset == data + columns // 2
    assert extent.length == rows * columns - columns // 2
    assert (run.length, run.count, run.stride) == (columns // 2, rows, columns)
    assert plan.weights_bytes == rows * columns // 2


def test_columns_with_wide_gaps_are_a_read_a_row(tmp_path: Path) -> None:
    rows, columns = 5, 128 * KIB + 2
    root, data = wide(tmp_path, rows, columns)
    plan = plan_of(root, 1, 2)
    assert [(e.file_offset - data, e.length) for e in plan.stages[1].extents] == [
        (row * columns + columns // 2, columns // 2) for row in range(rows)
    ]
    assert plan.read_bytes == plan.weights_bytes == rows * columns // 2


def test_a_tensor_is_not_taken_apart_into_more_reads_than_a_plan_can_hold(tmp_path: Path) -> None:
    root, _ = wide(tmp_path, MAX_ROWS + 1, 128 * KIB + 2)
    assert len(plan_of(root, 0, 2).stages[1].extents) == 1


def test_rows_of_neighbours_are_read_together_where_the_gap_is_small(tmp_path: Path) -> None:
    names = ["gate_proj", "up_proj"]
    for height, extents in ((64 * KIB, 1), (64 * KIB + 1, 2)):
        # Between two slices by halves lies one half.
        tensors = [
            (f"model.layers.0.mlp.{name}.weight", "U8", [2, height], bytes(2 * height))
            for name in names
        ]
        root = write_model(tmp_path / str(height), [tensors])
        plan = plan_of(root, 1, 2)
        assert len(plan.stages[1].extents) == extents
        assert plan.weights_bytes == 2 * height
        assert plan.read_bytes == 2 * height + (height if extents == 1 else 0)


# KV heads


def test_kv_heads_are_replicated_where_ranks_are_more(tmp_path: Path) -> None:
    shape = Shape(heads=8, kv_heads=2, head_dim=3, inner=8)
    root = write(tmp_path, shape, dtype="U8")
    name = "model.layers.1.self_attn.k_proj.weight"
    with safe_open(root / "model.safetensors", "pt") as file:
        whole = file.get_tensor(name)
    held = [load(root, plan_of(root, rank, 8))[0][name] for rank in range(8)]
    assert all(torch.equal(part, whole[:3]) for part in held[:4])
    assert all(torch.equal(part, whole[3:]) for part in held[4:])


def test_without_a_head_dim_the_query_projection_tells(tmp_path: Path) -> None:
    shape = Shape(heads=8, kv_heads=2, head_dim=3, inner=8)
    config = shape.config
    del config["head_dim"]
    root = write(tmp_path / "a", shape, config=config)
    assert plan_of(root, 3, 4).placements == plan_of(write(tmp_path / "b", shape), 3, 4).placements
    # Silent on its KV heads, it means as many as there are heads; they would be cut in two.
    del config["num_key_value_heads"]
    root = write(tmp_path / "c", shape, config=config)
    with pytest.raises(CheckpointError, match=r"does not match config\.json"):
        plan_of(root, 0, 4)


# What cannot be divided


@pytest.mark.parametrize(
    ("shape", "ranks", "tensor", "wanted", "got"),
    [
        (Shape(heads=6, kv_heads=2), 4, "q_proj.weight", "a multiple of 4", "6 heads"),
        (Shape(heads=12, kv_heads=6, inner=8), 4, "k_proj.weight", "a multiple of 4", "6 KV heads"),
        (Shape(heads=12, kv_heads=3, inner=8), 4, "k_proj.weight", "a divisor of 4", "3 KV heads"),
        (Shape(inner=9), 2, "gate_proj.weight", "a multiple of 2", "9 rows or columns"),
        (Shape(vocab=100), 3, "embed_tokens.weight", "a multiple of 3", "128 rows with padding"),
    ],
    ids=["heads", "kv-heads", "kv-replicas", "mlp", "vocabulary"],
)
def test_what_does_not_divide_is_named(
    tmp_path: Path, shape: Shape, ranks: int, tensor: str, wanted: str, got: str
) -> None:
    root = write(tmp_path, shape)
    with pytest.raises(CheckpointError, match=f"does not divide over {ranks} ranks") as caught:
        plan_of(root, 0, ranks)
    assert str(caught.value.where).endswith(f"{tensor}'")
    assert (caught.value.expected, caught.value.got) == (wanted, got)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_attention_heads": None}, "does not say"),
        ({"num_attention_heads": "4"}, "does not say"),
        ({"num_key_value_heads": 0}, "does not say"),
        ({"num_key_value_heads": True}, "does not say"),
        ({"head_dim": 5}, "does not match"),
        ({"num_key_value_heads": 4}, "does not match"),
        ({"head_dim": None, "num_attention_heads": 3}, "not known"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    shape = Shape()
    root = write(tmp_path, shape, config=shape.config | change)
    with pytest.raises(CheckpointError, match=what):
        plan_of(root, 0, 2)
    # Undivided, nobody asks.
    assert Plan.build(Checkpoint.open(root)).rank == Rank(0, 1)


def test_a_tensor_of_other_dimensions_is_an_error(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    root = write_model(tmp_path, [[(name, "U8", [8], bytes(8))]])
    with pytest.raises(CheckpointError, match="other dimensions"):
        plan_of(root, 0, 2)


def test_a_packed_tensor_is_cut_between_bytes_or_not_at_all(tmp_path: Path) -> None:
    def packed(name: str, shape: list[int], ranks: int) -> Plan:
        tensor = (f"layers.0.mlp.{name}.weight", "F4", shape, bytes(range(prod(shape) // 2)))
        root = tmp_path / f"{name}-{shape}"
        write_model(root, [[tensor]])
        return plan_of(root, ranks - 1, ranks)

    (run,) = packed("down_proj", [3, 8], 2).stages[1].extents[0].runs
    assert (run.length, run.count, run.stride) == (2, 3, 4)
    assert packed("gate_proj", [4, 3], 2).weights_bytes == 3
    for name, shape, ranks in (
        ("down_proj", [2, 6], 2),  # three elements a slice
        ("down_proj", [2, 5], 5),  # a row and a half
        ("gate_proj", [2, 3], 2),
    ):
        with pytest.raises(CheckpointError, match="inside a byte"):
            packed(name, shape, ranks)


@pytest.mark.parametrize(("index", "ranks"), [(2, 2), (-1, 2), (0, 0), (0, -1)])
def test_there_is_no_such_rank(index: int, ranks: int) -> None:
    with pytest.raises(ColdframeError, match="no such rank"):
        Rank(index, ranks)


def test_slices_mirror_no_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, Shape()))
    with pytest.raises(ColdframeError, match="cannot have this layout"):
        Plan.build(checkpoint, rank=Rank(0, 2))
    # The only rank of one holds the model as it is.
    assert Plan.build(checkpoint, rank=Rank(0, 1)) == Plan.build(checkpoint)


# On its way to another process


def test_a_slice_survives_the_wire_and_each_has_a_hash_of_its_own(tmp_path: Path) -> None:
    root = write(tmp_path, Shape(heads=8, kv_heads=1, inner=8))
    plans = [plan_of(root, rank, 2) for rank in range(2)]
    plans += [plan_of(root, 0, 1), plan_of(root, 0, 4)]
    for plan in plans:
        assert Plan.from_wire(json.loads(json.dumps(plan.to_wire()))) == plan
    assert len({plan.hash for plan in plans}) == len(plans)


def test_the_rank_alone_makes_another_hash(tmp_path: Path) -> None:
    # Nothing in it is divided: the bytes are the same, and yet these are two ranks.
    root = write_model(tmp_path, [[("model.norm.weight", "U8", [8], bytes(8))]])
    assert plan_of(root, 0, 2).hash != plan_of(root, 1, 2).hash
