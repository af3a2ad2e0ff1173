from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from coldframe.benchmarks import handoff, handoff_ways
from coldframe.benchmarks.document import SCHEMA
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica

Make = Callable[..., Path]


@pytest.mark.heavy
def test_the_benchmark_runs_and_ends_in_one_document(
    demo_model: Make, no_leaks: Path, tmp_path: Path
) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    model = demo_model("llama", "float32")
    out = tmp_path / "found.json"
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "coldframe", "bench", "handoff", model),
            *("--ways", "shared,devices,tcp,recomputed,cold", "--prompt-tokens", "40,300,4000"),
            *("--busy", "0,2", "--runs", "1", "--answer-tokens", "6", "--output", out),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    assert json.loads(out.read_text()) == found
    missing = {entry["what"]: entry["why"] for entry in found["left_out"]}
    assert "does not fit" in missing.pop("a prompt of 4000 tokens")
    if handoff_ways.gpus() < 2:
        assert "two GPUs" in missing.pop("devices")
    cells = {cell["id"]: cell for cell in found["cells"]}
    ways = ["shared", "tcp", "recomputed"]
    assert set(cells) >= {
        *(f"{way}/{length}/{busy}" for way in ways for length in (40, 300) for busy in (0, 2)),
        "cold/40/0",
        "cold/300/0",
    }
    config = json.loads((model / "config.json").read_text())
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    for cell in cells.values():
        assert cell["bytes"] == 4 * values * cell["prompt_tokens"]
        (second,), (step,), (beyond,) = (
            cell[name]["runs"] for name in ("second", "step", "beyond")
        )
        assert beyond == pytest.approx(second - step)
        assert min(second, step, cell["ttft"]["median"]) > 0
        assert cell["clock"] == ("spans" if cell["way"] == "cold" else "tokens")
        # float32: computed again, or by other processes, they are the same
        assert cell["tokens_equal"] is (None if cell["way"] == "shared" else True)
    met = [target["met"] for target in found["targets"]]
    assert len(met) == 2
    assert done.returncode == (0 if all(met) else 1)
    assert [line.split()[0] for line in table[1 : len(cells) + 1]] == [
        cell["way"] for cell in found["cells"]
    ]


@pytest.mark.heavy
def test_a_request_that_fails_says_why(
    demo_model: Make, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    # Room for 32 tokens or so.
    options = ReplicaOptions(str(demo_model("llama", "float32")), kv_bytes=128 << 10)
    with Replica(options) as replica:
        replica.run_until(
            lambda: replica.known and replica.loaded and replica.staff["decode"]["up"] > 0
        )
        replicated = handoff_ways.Replicated(replica)
        with pytest.raises(ColdframeError, match="more KV than there is"):
            replicated.hand(list(range(5, 305)), 4, 0)
        assert len(replicated.hand(list(range(5, 13)), 4, 0).tokens) == 4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--runs", "0"], "--runs"),
        (["--answer-tokens", "3"], "--answer-tokens"),
        (["--prompt-tokens", "64,x"], "--prompt-tokens"),
        (["--prompt-tokens", "0"], "--prompt-tokens"),
        (["--prompt-tokens", "99999"], "no prompt fits"),
        (["--busy", "-1"], "--busy"),
        (["--ways", "elsewhere"], "elsewhere"),
        (["--ways", "vllm"], "nothing to measure"),
        (["--ways", "vllm", "--vllm-python", "/none"], "no interpreter"),
        (["--output", "/none/out.json"], "--output"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    demo_model: Make, arguments: list[str], word: str
) -> None:
    parser = Parser()
    handoff.add_arguments(parser)
    parser.flag("--device", default="cpu")
    with pytest.raises(RequestError, match=word):
        handoff.run(parser.parse([str(demo_model("llama", "float32")), *arguments]))


def test_gpus_are_counted_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_ways, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert handoff_ways.gpus() == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert handoff_ways.gpus() == 2
    wanted = argparse.Namespace(device="cuda:0", vllm_python=None, pin=False)
    assert handoff_ways.left_out(["shared", "devices"], wanted) == []
    wanted.device = "cpu"
    assert [e["what"] for e in handoff_ways.left_out(["shared", "devices"], wanted)] == ["devices"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert handoff_ways.gpus() == 1
