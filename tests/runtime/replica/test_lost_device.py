"""A GPU that fails in a worker's hands: the front hears what it was, and another worker goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from coldframe.loader.errors import (
    ArenaError,
    ColdframeError,
    DeviceError,
    DeviceFull,
    DeviceLost,
    MemoryServiceGone,
    NoDevice,
    ReplicaError,
)
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.launch import WorkerProcess
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.workforce import Workforce
from coldframe.runtime.worker.process import _typed
from tests.runtime.helpers import ask, expected, finish, prompt_of

# Read by every interpreter that starts: the first worker of a role to come so far has a model whose
# layers fail as torch's do on a GPU that breaks, or is full.
FAILING = """
import importlib.util, os, sys

class Breaks:
    def find_spec(self, name, path, target=None):
        if name != "coldframe.runtime.engine.{module}":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            once = module.{owner}.{method}
            def method(*arguments):
                import torch
                try:
                    os.close(os.open({flag!r}, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    return once(*arguments)
                error = {error}
                error.error_code = 719
                raise error
            module.{owner}.{method} = method
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Breaks())
"""
LOST = "torch.AcceleratorError('CUDA error: unspecified launch failure')"
FULL = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 MiB.')"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), DeviceFull),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling x"), DeviceLost),
        (RuntimeError("a mistake"), ReplicaError),
        (KeyError("a mistake"), ReplicaError),
    ],
)
def test_what_ends_a_worker_has_a_type(error: Exception, kind: type[ColdframeError]) -> None:
    typed = _typed(error, "prefill")
    assert type(typed) is kind
    assert typed.where == "prefill"
    assert type(ColdframeError.from_wire(typed.to_wire())) is kind


@pytest.mark.parametrize(
    ("kind", "up", "answered", "its_own"),
    [
        (DeviceLost, True, True, True),
        (DeviceError, True, True, True),
        (DeviceLost, False, True, False),  # its successor was not even let to the device
        (DeviceFull, False, True, True),  # there is room for those who are up
        (DeviceFull, False, False, False),
        (DeviceError, True, False, False),  # it may be of no use at all
        (DeviceLost, True, False, True),
        (NoDevice, True, True, False),  # nor will the next one have it
        (ReplicaError, False, False, True),
        (MemoryServiceGone, True, True, True),
        (ArenaError, True, True, False),
    ],
)
def test_who_is_replaced(
    kind: type[ColdframeError], up: bool, answered: bool, its_own: bool
) -> None:
    owner = SimpleNamespace(answered=answered)
    workforce = cast(Workforce, SimpleNamespace(_owner=owner, _device_lost_at=-math.inf))
    worker = cast(
        WorkerProcess, SimpleNamespace(role="decode", up=up, restoring=False, trying=None)
    )
    assert Workforce._is_its_own(workforce, kind("it broke"), worker) == its_own
    if kind is DeviceLost:  # two of them are no chance
        assert not Workforce._is_its_own(workforce, kind("it broke"), worker)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("module", "owner", "method", "error", "says"),
    [
        ("prefill", "Prefiller", "advance", LOST, "CUDA_ERROR_LAUNCH_FAILED"),
        ("decode", "Decoder", "step", FULL, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_another_worker_goes_on(
    demo_model: Callable[..., Path],
    no_leaks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    owner: str,
    method: str,
    error: str,
    says: str,
) -> None:
    flag = tmp_path / "broke"
    code = FAILING.format(module=module, owner=owner, method=method, flag=str(flag), error=error)
    (tmp_path / "sitecustomize.py").write_text(dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heard: list[str] = []
    model, prompt = demo_model(), prompt_of(40)
    with Replica(ReplicaOptions(str(model), run_dir=str(no_leaks), threads=1)) as replica:
        gone = replica._workforce._router.worker_gone

        def worker_gone(name: str, why: str) -> None:
            heard.append(why)
            gone(name, why)

        monkeypatch.setattr(replica._workforce._router, "worker_gone", worker_gone)
        client = ask(replica, prompt, 8)
        finish(replica, client)
        assert client.tokens == expected(model, tuple(prompt), 8)
    assert flag.exists()
    assert len([why for why in heard if says in why]) == 1
