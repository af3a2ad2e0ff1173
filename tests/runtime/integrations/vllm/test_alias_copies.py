"""Copies into parameters, noted and settled: aliases, copies, and what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from coldframe.loader.errors import CheckpointError
from coldframe.loader.loads.options import LoadOptions
from coldframe.runtime.integrations.vllm.alias_copies import Copies, Shown
from coldframe.runtime.integrations.vllm.attached import OwnMemory, attach, release
from coldframe.runtime.worker.tensors import tensors_of

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def arena(demo_model):
    memory = OwnMemory(LoadOptions(str(demo_model()), layout="aligned"))
    client = attach({"memory_service": memory.path})
    plan, mapped = client.wait_weights()
    client.wait_stage(len(plan.stages) - 1)
    yield plan, mapped
    release(client)
    memory.close()


@pytest.fixture
def copying(arena):
    """`copying(shape, dtype)` makes a parameter and what watches it."""

    def make(*shape, dtype=torch.float32, apart=None):
        parameter = torch.nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=False)
        return parameter, Copies(*arena, {"p": parameter}, lambda name, _: apart)

    return make


def _shown(arena, name):
    placement = arena[0].placements[name]
    return Shown(placement, placement.shape, (0,) * len(placement.shape))


def test_parts_that_lie_one_behind_another_are_one_parameter(arena, copying):
    tensors = tensors_of(*arena)
    names = [f"{LAYER}.self_attn.{role}_proj.weight" for role in "vqk"]
    rows = [tensors[name].shape[0] for name in names]
    parameter, copies = copying(sum(rows), tensors[names[0]].shape[1])
    q, k = rows[1], rows[2]
    with copies:
        for name, at in zip(names, (q + k, 0, q), strict=True):
            shown = copies.show(_shown(arena, name))
            parameter.data.narrow(0, at, shown.shape[0]).copy_(shown)
        assert (parameter == 7).sum() == 0  # a look at it has the copies done
    assert copies.fates["p"].why == "eq on it"
    parameter, copies = copying(sum(rows), tensors[names[0]].shape[1])
    with copies:
        for name, at in zip(names, (q + k, 0, q), strict=True):
            shown = copies.show(_shown(arena, name))
            parameter.data.narrow(0, at, shown.shape[0]).copy_(shown)
    copies.settle()
    assert copies.fates["p"].address == parameter.data_ptr() == tensors[names[1]].data_ptr()
    assert torch.equal(parameter[:q], tensors[names[1]])
    assert torch.equal(parameter[q + k :], tensors[names[0]])


@pytest.mark.parametrize(
    ("dtype", "more_rows", "apart", "why"),
    [
        (torch.bfloat16, 0, None, "cast"),
        (torch.float32, 3, None, "in part"),
        (torch.float32, 0, "as asked", "as asked"),
    ],
)
def test_what_must_be_copied(arena, copying, dtype, more_rows, apart, why):
    name = "model.embed_tokens.weight"
    expected = tensors_of(*arena)[name]
    rows, columns = expected.shape
    parameter, copies = copying(rows + more_rows, columns, dtype=dtype, apart=apart)
    with copies:
        parameter.data[:rows].copy_(copies.show(_shown(arena, name)))
    copies.settle()
    assert copies.fates["p"].why == why
    assert copies.fates["p"].address is None
    assert torch.equal(parameter[:rows], expected.to(dtype))
    assert (parameter[rows:] == 7).all()


def test_padding_is_filled_behind_the_copy(arena, copying):
    name = "model.embed_tokens.weight"
    expected = tensors_of(*arena)[name]
    rows, columns = expected.shape
    parameter, copies = copying(rows + 2, columns)
    with copies:
        parameter.data[:rows].copy_(copies.show(_shown(arena, name)))
        parameter.data[rows:].fill_(0)
    copies.settle()
    assert copies.fates["p"].why == "padded"
    assert torch.equal(parameter[:rows], expected)
    assert (parameter[rows:] == 0).all()


def test_what_vllm_has_dropped_is_free(arena, copying):
    """Packed layers have parameters of their own; what was packed is not to be there as well."""
    name = "model.embed_tokens.weight"
    parameter, copies = copying(*tensors_of(*arena)[name].shape, apart="as asked")
    memory = weakref.ref(parameter.untyped_storage())
    with copies:
        parameter.data.copy_(copies.show(_shown(arena, name)))
    copies.settle()
    assert memory() is not None
    del parameter
    assert memory() is None


def test_a_parameter_that_is_replaced_in_mid_load_has_its_weights(arena, copying):
    name = "model.embed_tokens.weight"
    expected = tensors_of(*arena)[name]
    parameter, copies = copying(*expected.shape)
    with copies:
        parameter.data.copy_(copies.show(_shown(arena, name)))
        parameter = torch.nn.Parameter(parameter.data, requires_grad=False)
    copies.settle()
    assert torch.equal(parameter, expected)
    assert copies.fates["p"].why == "replaced"


def test_nothing_writes_to_the_arena(arena, copying):
    _, copies = copying(1)
    with copies, pytest.raises(CheckpointError, match="writes to a weight"):
        copies.show(_shown(arena, "model.norm.weight")).mul_(2)


def test_a_slice_is_shown_as_the_whole_and_read_as_the_slice(arena, copying):
    """As a rank sees it whose arena has the second half of the columns alone."""
    name = f"{LAYER}.mlp.down_proj.weight"
    placement = arena[0].placements[name]
    rows, columns = placement.shape
    half = replace(placement, shape=(rows, columns // 2), nbytes=placement.nbytes // 2)
    shown = Shown(half, placement.shape, (0, columns // 2))
    parameter, copies = copying(rows, columns // 2)
    with copies:
        whole = copies.show(shown)
        assert whole.shape == placement.shape
        parameter.data.copy_(whole.narrow(1, columns // 2, columns // 2))
        with pytest.raises(CheckpointError, match="more of a tensor than this rank has"):
            whole.narrow(1, 0, columns // 2).sum()
        with pytest.raises(CheckpointError, match="more of a tensor than this rank has"):
            parameter.data.copy_(whole.narrow(1, 0, columns // 2))
    copies.settle()
    assert copies.fates["p"].address == arena[1].address + placement.arena_offset
    flat = tensors_of(*arena)[name].view(-1)[: rows * columns // 2]
    assert torch.equal(parameter.view(-1), flat)
