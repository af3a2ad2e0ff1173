"""Which kernel for ragged batches is used, and that it is asked the right thing.

Torch has none for a CPU. Its place is taken by one of ours, with the same parameters, that computes
each token by itself from what it is given; and by others that refuse some of it, or do it wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from coldframe.runtime.engine import varlen
from coldframe.runtime.engine.attention import attend
from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.varlen import WAYS, Varlen, Way, find
from tests.runtime.engine.conftest import small_config
from tests.runtime.engine.test_on_a_gpu import BATCHES, chunks, on_gpu

CPU = torch.device("cpu")
OPERATOR = torch.ops.aten._flash_attention_forward.default
Kernel = Callable[..., tuple[Tensor, ...]]


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    """What the parameters mean, by torch's documentation of `varlen_attn`."""
    assert (dropout_p, return_debug_mask, scale, alibi_slopes) == (0.0, False, None, None)
    assert seqused_k is not None
    assert window_size_left is not None
    # With no bound at all a kernel may pack the heads that share keys.
    whole = window_size_left < 0
    assert (window_size_right, is_causal) == (-1 if whole else 0, whole)
    assert num_splits == 1 or block_table is None
    for numbers in (cum_seq_q, cum_seq_k, seqused_k, block_table):
        assert numbers is None or numbers.dtype == torch.int32
    assert max_q == int(cum_seq_q.diff().max())
    assert max_k >= int(seqused_k.max())  # a bound, as where steps are padded
    groups = query.shape[1] // key.shape[-2]
    out = torch.empty_like(query)
    for s, (start, end) in enumerate(pairwise(cum_seq_q.tolist())):
        used = int(seqused_k[s])
        if block_table is None:
            assert cum_seq_k is not None
            first = int(cum_seq_k[s])
            assert first + used <= int(cum_seq_k[s + 1])
            keys, values = key[first : first + used], value[first : first + used]
        else:
            table = block_table[s, : -(-used // key.shape[1])].long()
            keys, values = (x[table].flatten(0, 1)[:used] for x in (key, value))
        keys, values = (x.float().repeat_interleave(groups, 1) for x in (keys, values))
        for row in range(start, end):
            last = used - (end - row)  # the last query sees the last key
            low = 0 if window_size_left < 0 else max(0, last - window_size_left)
            seen = slice(low, last + 1)
            scores = torch.einsum("hd,thd->ht", query[row].float(), keys[seen])
            weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
            out[row] = torch.einsum("ht,thd->hd", weights, values[seen]).to(out.dtype)
    return (out, *[torch.empty(0)] * 4)


def but(**changes: Callable[[Any], Any]) -> Kernel:
    """The kernel with some of its arguments changed on the way."""

    def changed(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        names = inspect.signature(kernel).parameters
        given = dict(zip(names, arguments, strict=False)) | options
        return kernel(**{n: changes.get(n, lambda same: same)(x) for n, x in given.items()})

    changed.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return changed


def without(function: Kernel, *names: str) -> Kernel:
    """The kernel of an older torch, which lacks some parameters."""

    def older(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        assert not options.keys() & set(names)
        return function(*arguments, **options)

    signature = inspect.signature(function)
    left = [p for p in signature.parameters.values() if p.name not in names]
    older.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return older


def refuse(given: Any) -> Any:
    if given is not None:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    return given


def insist(given: Any) -> Any:
    if given is None:
        raise RuntimeError("cum_seq_q and cum_seq_k must be both set or both not set")
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
    found = find(spec_of("mistral", sliding_window=window), dtype, CPU, operator=kernel)
    assert found.varlen is not None
    assert found.varlen.way == WAYS[0]
    assert str(found) == "attention over pages"


@pytest.mark.parametrize(
    ("operator", "way"),
    [
        (but(cum_seq_k=insist), WAYS[1]),
        (but(block_table=refuse), WAYS[2]),
        (but(block_table=lambda table: None if table is None else table.flip(1)), WAYS[2]),
        (but(key=lambda key: key if key.dim() == 3 else key.flip(0).contiguous()), WAYS[2]),
        (without(kernel, "block_table"), WAYS[2]),
        (but(num_splits=refuse), WAYS[3]),
        (without(kernel, "num_splits"), WAYS[3]),
        (without(kernel, "num_splits", "block_table"), WAYS[3]),
    ],
    ids=[
        "starts",
        "pages refused",
        "a table misread",
        "a stride misread",
        "no pages",
        "splits refused",
        "splits",
        "an old one",
    ],
)
def test_one_that_cannot_do_all_is_asked_for_what_it_can(operator: Kernel, way: Way) -> None:
    found = find(spec_of(), torch.float32, CPU, operator=operator)
    assert found.varlen is not None
    assert found.varlen.way == way
    assert [refused for refused, _ in found.refused] == list(WAYS[: WAYS.index(way)])


@pytest.mark.parametrize(
    "operator",
    [
        but(query=refuse),
        but(value=lambda value: value * float("nan")),
        but(value=lambda value: value + 0.01),
        but(seqused_k=lambda used: used - 1),
        but(window_size_left=lambda left: left - 1),
        without(kernel, "seqused_k"),
        without(kernel, "window_size_left"),
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
def test_one_that_computes_something_else_is_not_used(operator: Kernel) -> None:
    spec = spec_of("mistral", sliding_window=33)
    found = find(spec, torch.float32, CPU, operator=operator)
    assert found.varlen is None
    assert [refused for refused, _ in found.refused] == list(WAYS)


def test_decode_is_tried_too() -> None:
    """A kernel takes another path where each sequence has one token."""

    def wrong(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        out, *rest = kernel(*arguments, **options)
        return (out + 1 if arguments[5] == 1 else out, *rest)

    wrong.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    assert find(spec_of(), torch.float32, CPU, operator=wrong).varlen is None


def test_it_is_said_why_a_way_is_not_taken() -> None:
    found = find(spec_of(), torch.float32, CPU, operator=but(block_table=refuse))
    assert str(found) == (
        "attention over copied blocks"
        "; not over pages: Paged KV cache block size must be divisible by 256"
        "; not over pages, told their starts: Paged KV cache block size must be divisible by 256"
    )
    off = find(spec_of(), torch.float32, CPU, operator=but(value=lambda value: value + 0.01))
    assert {why for _, why in off.refused} == {"it computes something else"}
    old = find(spec_of(), torch.float32, CPU, operator=without(kernel, "seqused_k"))
    assert {why for _, why in old.refused} == {"no parameter seqused_k"}


def test_where_the_reference_fails_that_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not taken for the kernel's fault."""

    def fail(*_: object) -> Tensor:
        raise RuntimeError("no SDPA here")

    monkeypatch.setattr(varlen, "attend", fail)
    with pytest.raises(RuntimeError, match="no SDPA here"):
        find(spec_of(), torch.float32, CPU, operator=kernel)


def test_the_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return attend(*arguments)

    monkeypatch.setattr(varlen, "attend", counted)
    find(spec_of(), torch.float32, CPU, operator=without(but(num_splits=refuse), "block_table"))
    assert len(calls) == 3


def test_a_device_that_is_lost_in_the_trial_is_told() -> None:
    with pytest.raises(torch.AcceleratorError):
        find(spec_of(), torch.float32, CPU, operator=but(query=lost))


def test_torchs_own_has_no_kernel_here() -> None:
    assert find(spec_of(), torch.bfloat16, CPU).varlen is None


def test_ours_has_the_parameters_of_torchs() -> None:
    theirs = {argument.name: argument for argument in OPERATOR._schema.arguments}
    for name, parameter in inspect.signature(kernel).parameters.items():
        assert theirs[name].kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)


def test_a_row_of_the_table_can_be_read_ahead() -> None:
    """What is there are blocks of the same sequence."""
    batch = Batch.build(
        [Chunk([7] * 70, 0, 70, [5, 9, 2]), Chunk([7], 300, 301, range(20, 40))], ragged=True
    )
    assert batch.ragged is not None
    assert batch.ragged.table.tolist() == [
        [5, 9, 2] + [5] * 13,
        [*range(20, 30)] + [20] * 6,
    ]


# -- in a model ----------------------------------------------------------------------------------

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "named layers slide": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_transformers(
    pair: Callable[..., Any],
    prompts: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    way: Way,
) -> None:
    family, changes = SHAPES[shape]
    both = pair(family, **changes)
    monkeypatch.setattr(both.model, "varlen", Varlen(kernel, way))
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", ["fresh prompts", "everything"])
def test_torchs_own_takes_what_it_is_given_on_a_gpu(batch: str, way: Way) -> None:
    """As far as fake tensors go: its parameters, where they are, and what comes out."""
    spec = spec_of("mistral", sliding_window=20)
    with on_gpu(spec) as (model, traffic):
        model.varlen = Varlen(OPERATOR, way)
        logits = model.forward(model.batch(chunks(BATCHES[batch])))
        assert logits.shape == (len(BATCHES[batch]), spec.vocab_size)
        assert (traffic.up, traffic.down, traffic.waits) == (1, 0, [])
