"""What is asked of torch on a GPU; see `questions`."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from coldframe.benchmarks.gpu.questions import up

__all__ = ["first_work", "graph", "nodes_of", "same_context", "varlen"]


def same_context(ordinal: int) -> str:
    import torch

    api: Any = import_module("cuda.bindings.driver")
    up(ordinal)
    _, ours = api.cuCtxGetCurrent()
    torch.ones(1, device=f"cuda:{ordinal}").item()
    _, theirs = api.cuCtxGetCurrent()
    return "yes" if int(ours) == int(theirs) else "no, it makes another current"


def first_work(ordinal: int) -> dict[str, float]:
    """What a worker's first kernels take: libraries and modules are loaded by the first call."""
    started = time.perf_counter()
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    found, before = {"import torch": time.perf_counter() - started}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal before
        torch.cuda.synchronize()
        found[name], before = time.perf_counter() - before, time.perf_counter()

    device = f"cuda:{ordinal}"
    a = torch.ones(64, 512, device=device, dtype=torch.bfloat16)
    lap("torch's context")
    _ = torch.nn.functional.linear(a, a)
    lap("first linear")
    q = torch.ones(1, 8, 64, 64, device=device, dtype=torch.bfloat16)
    scaled_dot_product_attention(q, q, q, is_causal=True)
    lap("first attention")
    return found


def varlen(ordinal: int) -> dict[str, Any]:
    """Its signature, and what it takes of paged KV."""
    import inspect

    import torch
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)
    found: dict[str, Any] = {"arguments": list(signature.parameters)}
    if "block_table" not in signature.parameters:
        return {**found, "block table": "it takes none"}
    for page in (16, 32, 64, 128, 256):
        for strided in (False, True):
            name = f"pages of {page}{' with a stride' if strided else ''}"
            try:
                error = _paged_error(varlen_attn, f"cuda:{ordinal}", page, strided)
                found[name] = f"largest difference {error:.4f}"
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - that it fails, and how, is the answer
                found[name] = str(error).splitlines()[0][:120]
    return found


def _paged_error(attention: Any, device: str, page: int, strided: bool) -> float:
    """How far attention over pages is from that over the same keys in a row."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads, dim, tokens = 8, 64, 512
    pages = tokens // page
    generator = torch.Generator(device).manual_seed(0)

    def some(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    # As our KV lies: keys and values of one layer beside those of another.
    store = some(pages, 4, page, heads, dim)
    keys, values = store[:, 0], store[:, 1]
    if not strided:
        keys, values = keys.contiguous(), values.contiguous()
    order = torch.randperm(pages, generator=generator, device=device)
    query = some(1, heads, dim)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    length = torch.tensor([tokens], dtype=torch.int32, device=device)
    pages_of_it = order.to(torch.int32)[None]
    try:
        got = attention(
            *(query, keys, values, starts, None, 1, tokens),
            seqused_k=length,
            block_table=pages_of_it,
        )
    except (TypeError, AttributeError):  # an older one wants the keys' bounds, too
        got = attention(
            *(query, keys, values, starts, starts * tokens, 1, tokens),
            seqused_k=length,
            block_table=pages_of_it,
        )
    k, v = (part[order].reshape(1, tokens, heads, dim).transpose(1, 2) for part in (keys, values))
    wanted = scaled_dot_product_attention(query.transpose(0, 1)[None], k, v)[0].transpose(0, 1)
    return float((got.float() - wanted.float()).abs().max())


def graph(ordinal: int) -> dict[str, Any]:
    """A step of two small layers, captured: how long that takes, and what it consists of."""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

    device, dtype = f"cuda:{ordinal}", torch.bfloat16
    x = torch.ones(1, 1024, device=device, dtype=dtype)
    w = torch.ones(1024, 1024, device=device, dtype=dtype) / 1024
    k = torch.ones(1, 8, 128, 128, device=device, dtype=dtype)

    def step() -> Any:
        y = x
        for _ in range(2):
            q = linear(rms_norm(y, (1024,)), w).view(1, 8, 1, 128)
            y = y + linear(scaled_dot_product_attention(q, k, k).reshape(1, 1024), w)
            y = y + linear(silu(linear(y, w)), w)
        return y

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    captured = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(captured, stream=side):
        step()
    capture_s = time.perf_counter() - started
    nodes, kernels = nodes_of(captured.raw_cuda_graph())
    return {"captured in": f"{capture_s * 1e3:.2f} ms", "nodes": nodes, "kernels": kernels}


def nodes_of(handle: int) -> tuple[dict[str, int], list[str]]:
    """How many nodes of each kind a graph (CUgraph) has, and the names of its kernels."""
    api: Any = import_module("cuda.bindings.driver")
    captured = api.CUgraph(handle)
    _, _, count = api.cuGraphGetNodes(captured)
    _, nodes, _ = api.cuGraphGetNodes(captured, count)
    kinds: dict[str, int] = {}
    kernels: list[str] = []
    for node in nodes:
        _, kind = api.cuGraphNodeGetType(node)
        name = kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()
        kinds[name] = kinds.get(name, 0) + 1
        if name == "kernel":
            _, parameters = api.cuGraphKernelNodeGetParams(node)
            code, told = api.cuFuncGetName(parameters.func)
            if code != api.CUresult.CUDA_SUCCESS:
                _, told = api.cuKernelGetName(parameters.kern)
            kernels.append((told or b"?").decode(errors="replace")[:80])
    return kinds, sorted(set(kernels))
