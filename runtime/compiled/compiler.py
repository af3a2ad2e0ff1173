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
import re
import shlex
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from coldframe.loader.errors import ColdframeError, PlatformError, ReplicaError
from coldframe.loader.process import die_with_parent
from coldframe.loader.wire import Channel
from coldframe.runtime.compiled.cxx import compiler_command, has_compiler
from coldframe.runtime.compiled.folder import (
    CodeFile,
    CodeFolder,
    SizedFiles,
    cached,
    open_root,
    write_private,
)
from coldframe.runtime.compiled.trial_plan import keys_worth
from coldframe.runtime.engine.code_shape import LEAST_KEYS, MOST_KEYS, CodeShape
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.replica.sizing import ModelFacts, StoredTensor
from coldframe.runtime.units import first_line

__all__ = ["compile_size", "compile_steps", "main"]

_NICE = 19
_FIRST_TO_DIE = "1000"
_OLD_S = 3600
_UNUSED_S = 30 * 24 * 3600
_WAIT_S = 120.0
"""How long another one may compile before this one gives up."""
_LOOK_S = 0.1
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_KEY = re.compile("[0-9a-f]{32}")
_SAID = re.compile(r"^[^\n]+: (?:fatal )?error: (.+)$", re.MULTILINE)


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
    try:
        _fill_cache(order)
        answer = {"type": "compiled"}
    except Exception as error:  # noqa: BLE001 - a compiler may fail in any way
        answer = {"type": "failed", "why": _why(error)}
    with contextlib.suppress(ReplicaError):  # who asked is gone
        control.send(answer)


def _why(error: Exception) -> str:
    """What went wrong, on one line; a compiler says that below what it was called with."""
    if isinstance(error, ColdframeError):
        return str(error)
    said = _SAID.search(str(error))
    why = f"{type(error).__name__}: {first_line(error)}"
    return why if said is None else f"{why}: {said[1].strip()}"


def _end_of_time(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)  # this process leads its group, in which the compiler is, too


def _fill_cache(order: dict[str, Any]) -> None:
    """Compiles what the cache does not have; one process at a time does."""
    with _locked(order["root"], _WAIT_S):
        signal.signal(signal.SIGALRM, _end_of_time)
        signal.alarm(order["limit_s"])
        _sweep(order["root"], order["writing"])
        place = os.path.join(order["root"], order["key"])
        if cached(order["root"], order["key"], order["since"]) is None:
            folder = os.path.join(order["writing"], "code")
            os.mkdir(folder, 0o700)
            compile_steps(order, folder, order["writing"])
            shutil.rmtree(place, ignore_errors=True)  # where it is damaged, or old
            os.rename(folder, place)


@contextlib.contextmanager
def _locked(root: str, wait_s: float) -> Iterator[None]:
    """Has a folder for this process alone.

    Raises:
        SnapshotError: It is not one that may be trusted.
        PlatformError: Another process has had it all the time.
    """
    folder = open_root(root)
    try:
        lock = os.open("lock", _LOCK, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        late = time.monotonic() + wait_s
        while not _taken(lock):
            if time.monotonic() >= late:
                raise PlatformError(
                    "another is being compiled", hint="Make the image again when that is done."
                )
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(root: str, own: str) -> None:
    """Removes what those who were killed have left, and what nobody has used for long."""
    for entry in os.scandir(root):
        with contextlib.suppress(OSError):  # whose it is may be removing it
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            left = entry.name.startswith(".writing-") and entry.path != own and age > _OLD_S
            if left or (_KEY.fullmatch(entry.name) and age > _UNUSED_S):
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
    if not has_compiler():
        raise PlatformError(
            "there is no C++ compiler to compile the decode step with",
            expected=compiler_command()[0],
            hint="Install one (make system), or leave it: steps are computed eagerly.",
        )
    _as_one_word(work)
    warnings.simplefilter("ignore")
    tensors = {name: StoredTensor(dtype, shape) for name, dtype, shape in order["tensors"]}
    spec = ModelFacts(order["directory"], tensors).spec
    shape = CodeShape.of_tensors(spec, tensors, order["threads"])

    import torch

    from coldframe.runtime.compiled.trial import Trial

    torch.set_num_threads(shape.threads)
    trial = Trial(spec, shape, max(order["sequences"]))
    kept: list[SizedFiles] = []
    said: list[str] = []
    for sequences in order["sequences"]:
        files = compile_size(spec, shape, sequences, place, work)
        folder = CodeFolder(place, shape, (files,), "")
        # Those that it would be used for: from the first that no smaller one has room for.
        ratios = trial.ratios(folder, {kept[-1].sequences + 1 if kept else 1, sequences})
        keys, speedup = keys_worth(ratios)
        counted = str(sequences) if said else f"{sequences} sequence{'s' * (sequences > 1)}"
        if 0 < keys < max(ratios):
            counted += f", up to {keys} tokens"
        said.append(f"{speedup:.2f}x ({counted})")
        if keys:
            # Those of several sequences are padded to blocks.
            keys = -(-keys // BLOCK_TOKENS) * BLOCK_TOKENS
            kept.append(replace(files, speedup=speedup, keys=keys))
    threads = f"{shape.threads} thread{'s' * (shape.threads > 1)}"
    note = f"{'compiled' if kept else 'not fast enough'}; {', '.join(said)} the speed of eager"
    folder = CodeFolder(place, shape, tuple(kept), f"{note}, {threads}")
    _remove_unused(folder)
    folder.write()
    return folder


def _as_one_word(work: str) -> None:
    """Puts a program in the place of a command of several words: torch takes no other."""
    words = compiler_command()
    if len(words) > 1:
        path = os.path.join(work, "c++")
        write_private(path, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'.encode())
        os.chmod(path, 0o700)
        os.environ["CXX"] = path


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

    from coldframe.runtime.engine.traced import TracedLayer, TracedLogits, layer_tensors
    from coldframe.runtime.engine.weights import Weights
    from coldframe.runtime.worker.tensors import torch_dtypes

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
    with open(str(made), "rb") as file:
        write_private(os.path.join(folder, name), file.read())
    return CodeFile.of(folder, name)


def _remove_unused(folder: CodeFolder) -> None:
    used = {file.name for size in folder.sizes for file in (size.layer, size.logits)}
    for name in os.listdir(folder.path):
        if name not in used:
            os.unlink(os.path.join(folder.path, name))
