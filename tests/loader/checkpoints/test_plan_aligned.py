"""The layout `aligned`: what lies where, and that its runs bring each byte there."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import MAX_GAP, Layout, Plan
from coldframe.loader.loads.placing import Placer
from coldframe.loader.sources.file import FileSource
from tests.loader.checkpoints.written import Tensor, tensor, write_model
from tests.loader.weights import arena_tensors, reference

GROUPS = [
    [f"self_attn.{role}_proj.{kind}" for role in ("q", "k", "v")] for kind in ("weight", "bias")
] + [[f"mlp.{role}_proj.{kind}" for role in ("gate", "up")] for kind in ("weight", "bias")]


def plan_of(root: Path, **how: Any) -> Plan:
    return Plan.build(Checkpoint.open(root), layout="aligned", **how)


def load(root: Path, plan: Plan, chunk: int = 1000) -> tuple[bytearray, int]:
    """The arena as the plan's runs fill it, a chunk at a time, and the bytes read for it."""
    memory = bytearray(b"\xa5" * plan.arena_bytes)
    source = FileSource(Checkpoint.open(root).shards)
    placer = Placer(source, memoryview(memory))
    read = 0
    for stage in plan.stages:
        for extent in stage.extents:
            end = extent.file_offset + extent.length
            for start in range(extent.file_offset, end, chunk):
                placer.fetch(extent, start, min(start + chunk, end))
            read += extent.length
    source.close()
    return memory, read


def check_loads(root: Path, plan: Plan, chunk: int = 1000) -> None:
    """Every tensor's bytes are at its place, and nothing was written between them."""
    memory, read = load(root, plan, chunk)
    expected = reference(root)
    assert arena_tensors(plan, memoryview(memory)) == {n: expected[n] for n in plan.placements}
    assert read == plan.read_bytes
    for place, end in itertools.pairwise(edges(plan)):
        assert place[1] <= end[0]
        assert memory[place[1] : end[0]] == b"\xa5" * (end[0] - place[1])


def edges(plan: Plan) -> list[tuple[int, int]]:
    """Where each tensor begins and ends in the arena, in that order, and the arena's own end."""
    spans = [(p.arena_offset, p.arena_offset + p.nbytes) for p in plan.placements.values()]
    return [*sorted(spans), (plan.arena_bytes, plan.arena_bytes)]


def in_arena(plan: Plan, prefix: str = "") -> list[str]:
    """The names of the tensors in the order of the arena, without a prefix."""
    placed = sorted(plan.placements.values(), key=lambda p: (p.arena_offset, p.nbytes))
    return [p.name.removeprefix(prefix) for p in placed if p.name.startswith(prefix)]


def together(plan: Plan, names: list[str]) -> bool:
    """Whether these tensors lie directly behind one another, the first of them on 256 bytes."""
    places = [plan.placements[name] for name in names]
    touch = all(a.arena_offset + a.nbytes == b.arena_offset for a, b in itertools.pairwise(places))
    return touch and places[0].arena_offset % 256 == 0


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Transformers saves of a model with biases: several shards, each sorted by name."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    root = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(config).save_pretrained(root, max_shard_size="400KB")
    assert len(list(root.glob("*.safetensors"))) > 2
    return root


@pytest.mark.parametrize("chunk", [100, 4096, 1 << 30])
def test_every_byte_of_a_transformers_checkpoint_comes_to_its_place(
    qwen2: Path, chunk: int
) -> None:
    check_loads(qwen2, plan_of(qwen2), chunk)


def test_what_runs_together_lies_together(qwen2: Path) -> None:
    plan = plan_of(qwen2)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        groups = [[prefix + name for name in group] for group in GROUPS]
        present = [group for group in groups if group[0] in plan.placements]
        assert len(present) == 3  # Qwen2's MLP has no biases
        assert all(together(plan, group) for group in present)


def test_tensors_are_aligned_and_stages_in_order(qwen2: Path) -> None:
    plan = plan_of(qwen2)
    assert plan.layout is Layout.ALIGNED
    assert plan.shard_bases == ()
    assert plan.arena_bytes % 65536 == 0
    assert all(p.arena_offset % 256 == 0 for p in plan.placements.values())
    by_place = sorted(plan.placements.values(), key=lambda p: p.arena_offset)
    assert [p.stage for p in by_place] == sorted(p.stage for p in by_place)
    # Alignment costs at most 255 bytes a tensor.
    assert by_place[-1].arena_offset + by_place[-1].nbytes <= (
        plan.weights_bytes + 255 * len(by_place)
    )


def test_it_reads_what_the_file_layout_reads(qwen2: Path) -> None:
    """Neighbours in the file are read together, wherever they go."""

    def reads(layout: Layout) -> list[tuple[int, int, int, int]]:
        plan = Plan.build(Checkpoint.open(qwen2), layout=layout)
        extents = [extent for stage in plan.stages for extent in stage.extents]
        return [(e.stage, e.shard, e.file_offset, e.length) for e in extents]

    assert reads(Layout.ALIGNED) == reads(Layout.FILE)
    assert any(len(e.runs) > 1 for stage in plan_of(qwen2).stages for e in stage.extents)


def test_the_order_of_a_file_is_kept_but_for_the_groups(tmp_path: Path) -> None:
    names = [
        "input_layernorm.weight",
        "mlp.down_proj.weight",
        "mlp.up_proj.weight",
        "mlp.gate_proj.weight",
        "self_attn.k_proj.bias",
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.q_proj.weight",
        "self_attn.v_proj.bias",
        "self_attn.v_proj.weight",
    ]
    prefix = "model.layers.0."
    root = write_model(tmp_path, [[tensor(prefix + name, 256) for name in names]])
    plan = plan_of(root)
    assert in_arena(plan, prefix) == [
        "input_layernorm.weight",
        "mlp.down_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
    ]
    (extent,) = plan.stages[1].extents
    # The norm and down_proj are neighbours in both; all others change places with one another.
    assert [run.length for run in extent.runs] == [512, *[256] * 9]
    check_loads(root, plan)


def test_being_adjacent_comes_before_alignment(tmp_path: Path) -> None:
    names = {role: f"layers.0.self_attn.{role}_proj.weight" for role in "koqv"}
    root = write_model(tmp_path, [[tensor(name, 10 + i) for i, name in enumerate(names.values())]])
    plan = plan_of(root)
    places = {role: plan.placements[name].arena_offset for role, name in names.items()}
    assert places == {"q": 0, "k": 12, "v": 22, "o": 256}
    check_loads(root, plan)


def test_tensors_of_two_dtypes_do_not_push_each_other_off_alignment(tmp_path: Path) -> None:
    parts: list[Tensor] = [
        ("layers.0.mlp.gate_proj.weight", "BF16", [3], bytes(6)),
        ("layers.0.mlp.up_proj.weight", "F32", [3], bytes(12)),
    ]
    plan = plan_of(write_model(tmp_path, [parts]))
    assert [p.arena_offset for p in plan.placements.values()] == [0, 256]


def test_groups_are_those_of_one_module(tmp_path: Path) -> None:
    """Two stacks of layers, and one whose file has no k: each keeps to its own."""
    encoder, decoder = (f"{stack}.layers.0.attn." for stack in ("encoder", "decoder"))
    names = [f"{stack}{role}_proj.weight" for role in "vkq" for stack in (encoder, decoder)]
    names.remove(f"{encoder}k_proj.weight")
    plan = plan_of(write_model(tmp_path, [[tensor(name, 100) for name in names]]))
    assert in_arena(plan, encoder) == ["q_proj.weight", "v_proj.weight"]
    assert together(plan, [f"{encoder}{role}_proj.weight" for role in "qv"])
    assert together(plan, [f"{decoder}{role}_proj.weight" for role in "qkv"])


def test_the_wire_and_the_hash_know_the_layout(qwen2: Path) -> None:
    plan = plan_of(qwen2)
    assert Plan.from_wire(json.loads(json.dumps(plan.to_wire()))) == plan
    assert plan.hash != Plan.build(Checkpoint.open(qwen2)).hash


_KINDS = [name for group in GROUPS for name in group] + [
    "self_attn.o_proj.weight",
    "input_layernorm.weight",
    "self_attn.rotary_emb.inv_freq",
]
NAMES = ["embed_tokens.weight", "norm.weight"] + [
    f"layers.{layer}.{kind}" for layer in range(2) for kind in _KINDS
]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 40), st.sampled_from([256, 512, 768])),
        min_size=len(NAMES),
        max_size=len(NAMES),
    ),
    shards=st.integers(1, 3),
    max_gap=st.sampled_from([0, 10, MAX_GAP]),
    chunk=st.integers(1, 3000),
    seed=st.integers(0, 1 << 16),
)
def test_of_random_checkpoints(
    sizes: list[int], shards: int, max_gap: int, chunk: int, seed: int
) -> None:
    shuffler = random.Random(seed)
    dealt: list[list[Tensor]] = [[] for _ in range(shards)]
    # A layer that is in no file is an error, so each keeps its norm.
    kept = [n for n in NAMES if "layernorm" in n or shuffler.random() < 0.9]
    size_of = dict(zip(NAMES, sizes, strict=True))
    for index, name in enumerate(shuffler.sample(kept, len(kept))):
        shuffler.choice(dealt).append(tensor(name, size_of[name], index))
    with tempfile.TemporaryDirectory() as directory:
        root = write_model(Path(directory), [shard for shard in dealt if shard])
        plan = plan_of(root, max_gap=max_gap)
        check_loads(root, plan, chunk)
    behind_another = set()
    for layer, group in itertools.product(range(2), GROUPS):
        names = [f"layers.{layer}.{name}" for name in group if f"layers.{layer}.{name}" in kept]
        if names:
            assert together(plan, names)
            behind_another.update(names[1:])
    for name, placement in plan.placements.items():
        assert placement.arena_offset % 256 == 0 or name in behind_another
