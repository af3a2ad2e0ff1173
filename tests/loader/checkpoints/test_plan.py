from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import MAX_GAP, Extent, Layout, Placement, Plan, Run
from coldframe.loader.errors import CheckpointError, ColdframeError
from tests.loader.checkpoints.written import Tensor, tensor, write_model, write_shard

MIB = 1 << 20


def plan_of(
    root: Path, shards: list[list[Tensor]], config: dict[str, Any] | None = None, **how: Any
) -> Plan:
    return Plan.build(Checkpoint.open(write_model(root, shards, config)), **how)


def staged(plan: Plan) -> dict[str, list[str]]:
    """The names of the tensors of each stage."""
    names: dict[str, list[str]] = {stage.name: [] for stage in plan.stages}
    for placement in plan.placements.values():
        names[plan.stages[placement.stage].name].append(placement.name)
    return names


def test_stages_come_in_the_order_of_use_not_of_the_file(tmp_path: Path) -> None:
    names = [
        "lm_head.weight",
        "model.layers.10.mlp.up_proj.weight",
        *(f"model.layers.{i}.mlp.up_proj.weight" for i in reversed(range(10))),
        "model.norm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
    ]
    plan = plan_of(tmp_path, [[tensor(name, 4) for name in names]])
    assert [stage.index for stage in plan.stages] == list(range(13))
    assert staged(plan) == {
        "embedding": ["model.embed_tokens.weight"],
        **{f"layer {i}": [f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)},
        "layer 2": ["model.layers.2.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"],
        **{f"layer {i}": [f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3, 11)},
        "head": ["lm_head.weight", "model.norm.weight"],
    }
    order = [placement.stage for placement in plan.placements.values()]
    assert order == sorted(order)
    assert plan.skipped == ()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "ln_f.weight"],
            [0, 0, 1, 2],
        ),
        (
            [
                "gpt_neox.embed_in.weight",
                "gpt_neox.layers.0.attention.dense.weight",
                "gpt_neox.final_layer_norm.weight",
                "embed_out.weight",
            ],
            [0, 1, 2, 2],
        ),
        (
            [
                "tok_embeddings.weight",
                "layers.0.attention.wq.weight",
                "norm.weight",
                "output.weight",
            ],
            [0, 1, 2, 2],
        ),
        (
            [
                "transformer.word_embeddings_layernorm.bias",
                "transformer.blocks.0.ffn.experts.3.w1.weight",
                "transformer.blocks.1.embedder.layers.0.weight",
                "transformer.norm_f.weight",
            ],
            [0, 1, 2, 3],
        ),
    ],
    ids=["gpt-2", "gpt-neox", "meta", "others"],
)
def test_the_order_needs_no_architecture(
    tmp_path: Path, names: list[str], expected: list[int]
) -> None:
    plan = plan_of(tmp_path, [[tensor(name, 4) for name in names]])
    assert [plan.placements[name].stage for name in names] == expected


def test_every_weight_of_a_transformers_model_is_planned(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (False, True):
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=16,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
        root = tmp_path / f"tied-{tied}"
        model.save_pretrained(root)
        plan = Plan.build(Checkpoint.open(root))
        assert plan.placements.keys() == {name for name, _ in model.named_parameters()}
        assert plan.weights_bytes == sum(4 * p.numel() for p in model.parameters())
        for index, layer in enumerate(model.model.layers):
            names = {f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()}
            assert set(staged(plan)[f"layer {index}"]) == names


def test_a_head_beside_its_tied_embedding_is_loaded_too(tmp_path: Path) -> None:
    # They may differ, and then Transformers does not tie them; only their bytes tell.
    names = ["model.embed_tokens.weight", "model.layers.0.a.weight", "lm_head.weight"]
    plan = plan_of(tmp_path, [[tensor(name, 4) for name in names]], {"tie_word_embeddings": True})
    assert plan.placements.keys() == set(names)
    assert plan.skipped == ()


def test_rotary_buffers_are_skipped(tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plan = plan_of(tmp_path, [[tensor("model.layers.0.w", 4), tensor(buffer, 4)]])
    assert plan.skipped == (buffer,)
    assert plan.read_bytes == 4


def test_a_missing_layer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_of(tmp_path, [[tensor(f"model.layers.{i}.w", 4) for i in (0, 1, 3, 999_999)]])
    error = caught.value
    assert (error.expected, error.got) == ("layers 0 to 999999", "no tensor of layer 2")


def test_a_checkpoint_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        plan_of(tmp_path / "a", [[]])
    with pytest.raises(CheckpointError, match="no weights"):
        plan_of(tmp_path / "b", [[tensor("rotary_emb.inv_freq", 4)]])


def test_a_stage_without_bytes_is_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [[tensor("layers.0.w", 4), tensor("layers.1.w", 0)]])
    assert [stage.name for stage in plan.stages] == ["embedding", "layer 0", "layer 1", "head"]
    assert [stage.nbytes for stage in plan.stages] == [0, 4, 0, 0]
    assert [len(stage.extents) for stage in plan.stages] == [0, 1, 0, 0]
    assert plan.placements["layers.1.w"].nbytes == 0


# Extents


def spans(plan: Plan, data: int) -> list[list[tuple[int, int]]]:
    """Each stage's extents as (begin, end) in the data of the one shard."""
    return [
        [(e.file_offset - data, e.file_offset - data + e.length) for e in stage.extents]
        for stage in plan.stages
    ]


def test_neighbours_of_a_stage_are_one_extent(tmp_path: Path) -> None:
    names = ["embed", "layers.0.a", "layers.0.b", "layers.1.a", "layers.0.c", "norm"]
    model = write_model(tmp_path, [[tensor(name, 10) for name in names]])
    checkpoint = Checkpoint.open(model)
    plan = Plan.build(checkpoint)
    data = checkpoint.shards[0].data_offset
    assert spans(plan, data) == [[(0, 10)], [(10, 30), (40, 50)], [(30, 40)], [(50, 60)]]
    assert [stage.nbytes for stage in plan.stages] == [10, 30, 10, 10]


@pytest.mark.parametrize(
    ("gap", "max_gap", "expected"),
    [
        (MAX_GAP, MAX_GAP, [(0, 8 + MAX_GAP)]),
        (MAX_GAP + 1, MAX_GAP, [(0, 4), (5 + MAX_GAP, 9 + MAX_GAP)]),
        (1, 0, [(0, 4), (5, 9)]),
    ],
)
def test_only_a_small_gap_that_nobody_wants_is_read(
    tmp_path: Path, gap: int, max_gap: int, expected: list[tuple[int, int]]
) -> None:
    parts = [tensor("layers.0.a", 4), tensor("rotary_emb.inv_freq", gap), tensor("layers.0.b", 4)]
    checkpoint = Checkpoint.open(write_model(tmp_path, [parts]))
    plan = Plan.build(checkpoint, max_gap=max_gap)
    assert spans(plan, checkpoint.shards[0].data_offset)[1] == expected
    assert plan.weights_bytes == 8
    assert plan.read_bytes == sum(end - begin for begin, end in expected)


def test_extents_do_not_join_over_shards(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [[tensor("layers.0.a", 4)], [tensor("layers.0.b", 4)]])
    assert [extent.shard for extent in plan.stages[1].extents] == [0, 1]


def test_the_file_layout_keeps_addresses_and_offsets_congruent(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        write_model(
            tmp_path,
            [
                [tensor("layers.0.a", 3 * MIB), tensor("layers.1.a", 5)],
                [tensor("layers.0.b", 7)],
                [tensor("layers.1.b", 100_000)],
            ],
        )
    )
    plan = Plan.build(checkpoint)
    assert plan.layout is Layout.FILE
    assert plan.shard_bases == (0, 4 * MIB, 6 * MIB)
    assert plan.arena_bytes == 6 * MIB + 2 * 65536
    for name, placement in plan.placements.items():
        info = checkpoint.tensors[name]
        assert placement == Placement(
            name=name,
            dtype=info.dtype,
            shape=info.shape,
            arena_offset=plan.shard_bases[info.shard] + info.offset,
            nbytes=info.nbytes,
            stage=1 if "layers.0" in name else 2,
        )
    for stage in plan.stages:
        for extent in stage.extents:
            place = plan.shard_bases[extent.shard] + extent.file_offset
            assert extent.runs == (Run(0, extent.length, place),)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ColdframeError, match="no such layout"):
        plan_of(tmp_path, [[tensor("layers.0.a", 4)]], layout="sideways")


# On its way to another process


def test_a_plan_survives_the_wire(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        [
            [tensor("embed_tokens.weight", 4), tensor("layers.0.a", 0), tensor("layers.0.b", 6)],
            [tensor("layers.0.rotary_emb.inv_freq", 4), ("scale", "F32", [], bytes(4))],
        ],
    )
    assert plan.skipped == ("layers.0.rotary_emb.inv_freq",)
    there = json.loads(json.dumps(plan.to_wire()))
    assert Plan.from_wire(there) == plan
    assert list(Plan.from_wire(there).placements) == list(plan.placements)


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    wire = plan_of(tmp_path, [[tensor("layers.0.a", 4)]]).to_wire()
    with pytest.raises(ColdframeError, match="another version"):
        Plan.from_wire({**wire, "version": 0})


def test_the_hash_tells_plans_and_checkpoints_apart(tmp_path: Path) -> None:
    shard = [tensor("layers.0.a", 4), tensor("rotary_emb.inv_freq", 4), tensor("layers.0.b", 4)]
    first = plan_of(tmp_path / "a", [shard]).hash
    assert len(first) == 64
    assert plan_of(tmp_path / "b", [shard]).hash == first
    others = {
        plan_of(tmp_path / "b", [shard], max_gap=0).hash,
        plan_of(tmp_path / "c", [shard], {"rope_theta": 1.0}).hash,
        plan_of(tmp_path / "d", [[*shard, tensor("norm", 4)]]).hash,
    }
    assert len(others | {first}) == 4


# At real sizes, and at random


def llama_8b() -> dict[str, list[int]]:
    """The tensors of Llama 3.1 8B with their shapes, in the order of its files."""
    shapes = {"model.embed_tokens.weight": [128256, 4096]}
    for i in range(32):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": [4096],
            layer + "mlp.down_proj.weight": [4096, 14336],
            layer + "mlp.gate_proj.weight": [14336, 4096],
            layer + "mlp.up_proj.weight": [14336, 4096],
            layer + "post_attention_layernorm.weight": [4096],
            layer + "self_attn.k_proj.weight": [1024, 4096],
            layer + "self_attn.o_proj.weight": [4096, 4096],
            layer + "self_attn.q_proj.weight": [4096, 4096],
            layer + "self_attn.v_proj.weight": [1024, 4096],
        }
    return shapes | {"model.norm.weight": [4096], "lm_head.weight": [128256, 4096]}


def test_a_model_of_eight_billion_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    header, end = {}, 0
    for name, shape in llama_8b().items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        offsets = [end, end + nbytes]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        end += nbytes
    path = tmp_path / "model.safetensors"
    write_shard(path, header)
    os.truncate(path, path.stat().st_size + end)

    plan = Plan.build(Checkpoint.open(tmp_path))
    assert len(plan.placements) == 291
    assert len(plan.stages) == 34
    assert plan.weights_bytes == plan.read_bytes == end == 2 * 8_030_261_248
    # The file is in the order of use but for its head, so each stage is one run of bytes.
    assert all(len(stage.extents) == 1 for stage in plan.stages)
    assert {stage.nbytes for stage in plan.stages[1:-1]} == {2 * 218_112_000}
    assert len(json.dumps(plan.to_wire())) < 40_000


NAMES = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.rotary_emb.inv_freq",
    *(f"model.layers.{i}.{kind}" for i in range(3) for kind in ("q", "k", "rotary_emb.inv_freq")),
]
_SIZES = st.lists(st.integers(0, 300), min_size=len(NAMES), max_size=len(NAMES))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    sizes=_SIZES,
    shards=st.integers(1, 4),
    max_gap=st.sampled_from([0, 1, 100, MAX_GAP]),
    seed=st.integers(0, 1 << 16),
)
def test_reading_the_extents_brings_every_tensor_and_no_byte_twice(
    sizes: list[int], shards: int, max_gap: int, seed: int
) -> None:
    tensors = [
        tensor(name, size, i) for i, (name, size) in enumerate(zip(NAMES, sizes, strict=True))
    ]
    shuffler = random.Random(seed)
    shuffler.shuffle(tensors)
    files: list[list[Tensor]] = [[] for _ in range(shards)]
    for item in tensors:
        shuffler.choice(files).append(item)
    files = [file for file in files if file]

    with tempfile.TemporaryDirectory() as root:
        checkpoint = Checkpoint.open(write_model(Path(root), files))
        plan = Plan.build(checkpoint, max_gap=max_gap)
        raw = [Path(shard.uri).read_bytes() for shard in checkpoint.shards]

    arena = bytearray(plan.arena_bytes)
    covered = bytearray(plan.arena_bytes)
    for stage in plan.stages:
        order = [(extent.shard, extent.file_offset) for extent in stage.extents]
        assert order == sorted(order)
        assert stage.nbytes == sum(extent.length for extent in stage.extents)
        for extent in stage.extents:
            assert extent.stage == stage.index
            _read(extent, raw, arena, covered)
        # When a stage is in, all of its tensors are.
        for placement in plan.placements.values():
            if placement.stage == stage.index:
                begin, end = placement.arena_offset, placement.arena_offset + placement.nbytes
                assert covered[begin:end] == b"\1" * placement.nbytes
    data = {item[0]: item[3] for item in tensors}
    assert plan.placements.keys() | set(plan.skipped) == data.keys()
    for name, placement in plan.placements.items():
        begin = placement.arena_offset
        assert arena[begin : begin + placement.nbytes] == data[name]
    assert max(covered) <= 1
    assert plan.read_bytes == sum(covered) >= plan.weights_bytes


def _read(extent: Extent, raw: list[bytes], arena: bytearray, covered: bytearray) -> None:
    (run,) = extent.runs
    assert (run.offset, run.length, run.count) == (0, extent.length, 1)
    begin, end = run.arena_offset, run.arena_offset + run.length
    assert extent.length > 0
    source = raw[extent.shard][extent.file_offset : extent.file_offset + extent.length]
    assert len(source) == extent.length
    arena[begin:end] = source
    covered[begin:end] = bytes(count + 1 for count in covered[begin:end])
