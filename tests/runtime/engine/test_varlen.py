"""Which kernel for ragged batches is used, and that it is asked the right thing.

There is none for a CPU. Its place is taken by one of ours, with the same parameters, that computes
each token by itself from what it is given; and by others that do it wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.varlen import Varlen, find
from tests.runtime.engine.conftest import small_config
from tests.runtime.engine.test_on_a_gpu import BATCHES, chunks, on_gpu

CPU = torch.device("cpu")
Kernel = Callable[..., Tensor]


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """What the parameters mean, by torch's documentation."""
    assert seqused_k is not None
    assert enable_gqa
    assert num_splits == 1
    assert window_size[1] == 0
    for numbers in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert numbers is None or numbers.dtype == torch.int32
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(seqused_k.max())
    groups = query.shape[1] // key.shape[-2]
    out = torch.empty_like(query)
    for s, (start, end) in enumerate(pairwise(cu_seq_q.tolist())):
        used = int(seqused_k[s])
        if block_table is None:
            assert cu_seq_k is not None
            first = int(cu_seq_k[s])
            assert first + used <= int(cu_seq_k[s + 1])
            keys, values = key[first : first + used], value[first : first + used]
        else:
            table = block_table[s, : -(-used // key.shape[1])].long()
            keys, values = (x[table].flatten(0, 1)[:used] for x in (key, value))
        keys, values = (x.float().repeat_interleave(groups, 1) for x in (keys, values))
        for row in range(start, end):
            last = used - (end - row)  # the last query sees the last key
            low = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            seen = slice(low, last + 1)
            scores = torch.einsum("hd,thd->ht", query[row].float(), keys[seen])
            weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
            out[row] = torch.einsum("ht,thd->hd", weights, values[seen]).to(out.dtype)
    return out


def but(**changes: Callable[[Any], Any]) -> Kernel:
    """The kernel with some of its arguments changed on the way."""

    def changed(*arguments: Any, **options: Any) -> Tensor:
        names = inspect.signature(kernel).parameters
        given = dict(zip(names, arguments, strict=False)) | options
        return kernel(**{n: changes.get(n, lambda same: same)(x) for n, x in given.items()})

    changed.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return changed


def without(function: Kernel, *names: str) -> Kernel:
    """The kernel of an older torch, which lacks some parameters."""

    def older(*arguments: Any, **options: Any) -> Tensor:
        assert not options.keys() & set(names)
        return function(*arguments, **{"enable_gqa": True, "num_splits": 1, **options})

    signature = inspect.signature(function)
    left = [p for p in signature.parameters.values() if p.name not in names]
    older.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return older


def refuse(given: Any) -> Any:
    if given is not None:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    return given


def lost(_: Any) -> Any:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700
    raise error


def spec_of(family: str = "llama", **changes: Any) -> ModelSpec:
    return ModelSpec.from_config(small_config(family, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20, 4000])
def test_a_kernel_that_takes_pages_is_used(dtype: torch.dtype, window: int | None) -> None:
    found = find(spec_of("mistral", sliding_window=window), dtype, CPU, function=kernel)
    assert found is not None
    assert found.paged


@pytest.mark.parametrize(
    "function",
    [
        but(block_table=refuse),
        but(block_table=lambda table: None if table is None else table.flip(1)),
        but(key=lambda key: key if key.dim() == 3 else torch.empty_like(key).copy_(key.flip(0))),
        without(kernel, "block_table"),
        without(kernel, "num_splits"),  # pages in several splits have gone wrong
    ],
    ids=["refused", "a wrong table", "a wrong stride", "no pages", "splits"],
)
def test_one_that_does_not_take_ours_gets_them_gathered(function: Kernel) -> None:
    found = find(spec_of(), torch.float32, CPU, function=function)
    assert found is not None
    assert not found.paged


@pytest.mark.parametrize(
    "function",
    [
        but(query=refuse),
        but(value=lambda value: value * float("nan")),
        but(value=lambda value: value + 0.01),
        but(seqused_k=lambda used: used - 1),
        but(window_size=lambda window: (window[0] - 1, 0)),
        without(kernel, "seqused_k"),
        without(kernel, "window_size"),
    ],
    ids=[
        "refused",
        "NaN",
        "off a little",
        "a token off",
        "a window off",
        "no lengths",
        "no window",
    ],
)
def test_one_that_computes_something_else_is_not_used(function: Kernel) -> None:
    spec = spec_of("mistral", sliding_window=33)
    assert find(spec, torch.float32, CPU, function=function) is None


def test_an_older_one_is_asked_for_what_it_has() -> None:
    found = find(spec_of(), torch.float32, CPU, function=without(kernel, "enable_gqa"))
    assert found is not None


def test_a_device_that_is_lost_in_the_trial_is_told() -> None:
    with pytest.raises(torch.AcceleratorError):
        find(spec_of(), torch.float32, CPU, function=but(query=lost))


def test_torchs_own_has_no_kernel_here() -> None:
    assert find(spec_of(), torch.bfloat16, CPU) is None


def test_ours_has_the_parameters_of_torchs() -> None:
    theirs = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(kernel).parameters.items():
        assert name in theirs
        assert parameter.kind is theirs[name].kind


# -- in a model ----------------------------------------------------------------------------------

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "no grouping": ("qwen2", {"num_key_value_heads": 4}),
    "named layers slide": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_transformers(
    pair: Callable[..., Any],
    prompts: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    paged: bool,
) -> None:
    family, changes = SHAPES[shape]
    both = pair(family, **changes)
    monkeypatch.setattr(both.model, "varlen", Varlen(kernel, paged=paged))
    mixed = [prompts[length] for length in (33, 1, 64)]
    assert both.greedy(mixed, 3) == [both.reference_greedy(ids, 3) for ids in mixed]
    ids = prompts[64]
    both.model.forward(both.model.batch([both.chunk(ids[:40], prompt=64)]))
    rest = both.model.batch([both.chunk(ids, start=40)])
    torch.testing.assert_close(
        both.model.logits(both.through(rest), rest, all_positions=True),
        both.reference_logits(ids)[40:],
        rtol=0.0,
        atol=1e-4,
    )


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_torchs_own_takes_what_it_is_given_on_a_gpu(batch: str, paged: bool) -> None:
    """As far as fake tensors go: its parameters, where they are, and what comes out."""
    spec = spec_of("mistral", sliding_window=20)
    with on_gpu(spec) as (model, traffic):
        model.varlen = Varlen(varlen_attn, paged=paged)
        logits = model.forward(model.batch(chunks(BATCHES[batch])))
        assert logits.shape == (len(BATCHES[batch]), spec.vocab_size)
        assert (traffic.up, traffic.down, traffic.waits) == (1, 0, [])
