"""Images of workers on an emulated GPU: frozen by CRIU, thawed by the memory service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.freezing import Freezing
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica import Replica
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.gpus import FOLDER
from tests.runtime.emulated import emulate, replays
from tests.runtime.helpers import ask, expected, finish, prompt_of
from tests.snapshot.nvidia import kernel_says

Make = Callable[..., Path]

pytestmark = pytest.mark.heavy


def options(model: Path, runs: Path, **more: Any) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), device="cuda:0", **more)


def test_try(
    criu: Criu, demo_model: Make, no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    emulate(monkeypatch, worker={"graphs": str(graphs)}, frozen={"graphs": str(graphs)})
    monkeypatch.setenv(FOLDER, str(kernel_says(tmp_path / "nvidia")))
    model = demo_model("llama")
    snapshot = SnapshotOptions("auto", str(tmp_path / "store"))
    with Replica(options(model, no_leaks, prefill=0, decode=0)) as replica:
        replica.run_until(lambda: replica.sized)
        freezing = Freezing(replica, snapshot)
        freezing.follow()
        print(freezing.error)
        print(freezing.manifest and freezing.manifest["gpu"])
        for span in replica.spans:
            print(span)
    print(replays(graphs))
    prompt = prompt_of(64, seed=1)
    with Replica(options(model, no_leaks, snapshot=snapshot)) as replica:
        client = ask(replica, prompt, 16)
        finish(replica, client)
        for span in replica.spans:
            print(span)
        print(replica.facts)
    print(client.error)
    assert client.tokens == expected(model, tuple(prompt), 16)
    print(replays(graphs))
