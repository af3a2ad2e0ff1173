"""The process that compiles a model's decode steps: nice, with a deadline that others keep.

It needs all of torch and a C++ compiler, which no worker does. Each number of sequences is compiled
for itself, tried on weights of the model's shapes against the model's own steps, in turns, and kept
where it says the same in less time.

Messages in:  `compile`.
Messages out: `compiled` (the folder is whole), or `failed`, with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.process import die_with_parent
from coldframe.loader.wire import Channel
from coldframe.runtime.code_folder import CodeFile, CodeFolder, SizedFiles, cached
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.sizing import ModelFacts, StoredTensor

__all__ = ["GAIN", "compile_size", "compile_steps", "main", "worth_keeping"]

GAIN = 1.03
"""How many times as fast as eager a step must be to be kept, in every case that is measured."""

_NICE = 19
_FIRST_TO_DIE = "1000"
_OLD_S = 3600


def main(control_fd: int, parent: int) -> None:
    """The process's entry.

    Args:
        control_fd: The inherited socket to whoever asks.
        parent: Whoever that is; this does not outlive it.
    """
    die_with_parent(parent)
    control = Channel.from_fd(control_fd)
    os.nice(_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_FIRST_TO_DIE)
    message = control.recv()
    if message is None:
        return
    order = message.body
    signal.signal(signal.SIGALRM, _end_of_time)
    signal.alarm(order["limit_s"])
    try:
        _fill_cache(order)
        answer = {"type": "compiled"}
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way
        why = str(error) if isinstance(error, ColdframeError) else _first_line(error)
        answer = {"type": "failed", "why": why}
    with contextlib.suppress(ReplicaError):  # who asked is gone
        control.send(answer)


def _end_of_time(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)  # this process leads its group, in which the compiler is, too


def _fill_cache(order: dict[str, Any]) -> None:
    """Compiles what the cache does not have; one process at a time does."""
    with open(os.path.join(order["root"], "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(order["root"], order["writing"])
        place = os.path.join(order["root"], order["key"])
        if cached(order["root"], order["key"]) is None:
            folder = os.path.join(order["writing"], "code")
            os.mkdir(folder, 0o700)
            compile_steps(order, folder, order["writing"])
            shutil.rmtree(place, ignore_errors=True)  # where it is damaged
            os.rename(folder, place)


def _sweep(root: str, own: str) -> None:
    """Removes what those who were killed have left."""
    for entry in os.scandir(root):
        old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD_S
        if entry.name.startswith(".writing-") and entry.path != own and old:
            shutil.rmtree(entry.path, ignore_errors=True)


def compile_steps(order: dict[str, Any], place: str, work: str) -> CodeFolder:
    """Fills a folder.

    Args:
        order: `directory` and `tensors` of the model, `threads`, `sequences`.
        place: The folder; it is empty.
        work: A folder for what is of no use afterwards.

    Raises:
        ColdframeError: It cannot be done here.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise PlatformError(
            "there is no C++ compiler to compile the decode step with",
            expected=compiler,
            hint="Install one (make system), or leave it: steps are computed eagerly.",
        )
    warnings.simplefilter("ignore")
    tensors = {name: StoredTensor(dtype, shape) for name, dtype, shape in order["tensors"]}
    spec = ModelFacts(order["directory"], tensors).spec
    shape = CodeShape.of_tensors(spec, tensors, order["threads"])

    import torch

    from coldframe.runtime.code_trial import Trial

    torch.set_num_threads(shape.threads)
    trial = Trial(spec, shape, max(order["sequences"]))
    kept: list[SizedFiles] = []
    said: list[str] = []
    for sequences in order["sequences"]:
        files = compile_size(spec, shape, sequences, place, work)
        folder = CodeFolder(place, shape, (files,), "")
        # Those that it would be used for: from the first that no smaller one has room for.
        ratios = trial.ratios(folder, {kept[-1].sequences + 1 if kept else 1, sequences})
        speedup = min(ratios)
        counted = str(sequences) if said else f"{sequences} sequence{'s' * (sequences > 1)}"
        said.append(f"{speedup:.2f}x ({counted})")
        if worth_keeping(ratios):
            kept.append(replace(files, speedup=speedup))
    threads = f"{shape.threads} thread{'s' * (shape.threads > 1)}"
    note = f"{'compiled' if kept else 'not fast enough'}; {', '.join(said)} the speed of eager"
    folder = CodeFolder(place, shape, tuple(kept), f"{note}, {threads}")
    _remove_unused(folder)
    folder.write()
    return folder


def worth_keeping(ratios: Sequence[float]) -> bool:
    """Whether a step is faster than eager in every case, by more than a measurement may err."""
    return bool(ratios) and min(ratios) >= GAIN


def compile_size(
    spec: ModelSpec, shape: CodeShape, sequences: int, folder: str, work: str
) -> SizedFiles:
    """Compiles the steps of one number of sequences.

    Args:
        spec: The model's shape.
        shape: The same, as far as it is in the code.
        sequences: How many.
        folder: Gets the two libraries.
        work: A folder for what is of no use afterwards.
    """
    import torch

    from coldframe.runtime.engine.compiled import LEAST_KEYS, MOST_KEYS
    from coldframe.runtime.engine.traced import TracedLayer, TracedLogits, layer_tensors
    from coldframe.runtime.engine.weights import Weights
    from coldframe.runtime.tensors import torch_dtypes

    one = replace(spec, layers=1, windows=(None,))
    dtypes = torch_dtypes()
    dtype, vectors = dtypes[shape.dtype], dtypes[shape.vectors]
    weights = Weights.of(
        {
            name: torch.zeros(size, dtype=vectors if len(size) == 1 else dtype)
            for name, size in one.expected_tensors().items()
        },
        one,
    )
    n = sequences
    x = torch.zeros(n, spec.hidden_size, dtype=dtype)
    rotation = torch.zeros(2, n, 1, spec.head_dim, dtype=dtype).unbind()
    rows = torch.arange(2 * n)
    cache = torch.zeros(96, spec.kv_heads * spec.head_dim, dtype=dtype)
    seen = torch.zeros(2, n, 64, dtype=torch.int64)
    inputs = [x, *rotation, rows, seen, torch.zeros(n, 64), cache]
    looked_at = torch.export.Dim("looked_at", min=LEAST_KEYS, max=MOST_KEYS)
    dynamic = [*[None] * 4, {2: looked_at}, {1: looked_at}, {0: torch.export.Dim("R", min=2)}]
    own = layer_tensors(weights.layers[0])
    layer = _library(
        TracedLayer(one),
        (*inputs, *own),
        (*dynamic, tuple([None] * len(own))),
        *(f"layer-{n}.so", shape.threads, folder, work),
    )
    logits = _library(
        TracedLogits(one),
        (x, weights.norm, weights.head),
        (None, None, None),
        *(f"logits-{n}.so", shape.threads, folder, work),
    )
    return SizedFiles(n, layer, logits, 0.0)


def _library(
    function: Any, inputs: Any, dynamic: Any, name: str, threads: int, folder: str, work: str
) -> CodeFile:
    """Compiles one function to a shared library."""
    import torch
    import torch._inductor

    options = {
        "aot_inductor.output_path": os.path.join(work, name),
        "aot_inductor.package": False,
        "aot_inductor.enable_line_tables": False,
        "cpp.threads": threads,
        # A loop over one row of numbers takes less time than waking another thread up for it.
        "cpp.min_chunk_size": 4096,
        "emulate_precision_casts": True,
        # Rows of the cache are made of the blocks that a batch was built with, which are checked.
        "assert_indirect_indexing": False,
    }
    known = set(torch._inductor.list_options())
    with torch.no_grad():
        exported = torch.export.export(function, inputs, dynamic_shapes=dynamic, strict=False)
        made = torch._inductor.aot_compile(
            exported.module(),
            inputs,
            options={name: value for name, value in options.items() if name in known},
        )
    shutil.copyfile(str(made), os.path.join(folder, name))
    return CodeFile.of(folder, name)


def _remove_unused(folder: CodeFolder) -> None:
    used = {file.name for size in folder.sizes for file in (size.layer, size.logits)}
    for name in os.listdir(folder.path):
        if name not in used:
            os.unlink(os.path.join(folder.path, name))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
