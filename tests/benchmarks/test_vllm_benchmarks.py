"""The benchmarks of vLLM, each with few cells and one run: `make test-vllm` runs them.

The figures of so small a model mean nothing: what counts is that each is there, and stands to the
others as it must on any machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.cold.contender import Asked
from coldframe.benchmarks.cold.peers import open_contender
from tests.support import without_settings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Make = Callable[..., Path]


class Document:
    """What a benchmark has printed: a table, and a line of JSON with the same figures."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        *table, last = done.stdout.splitlines()
        self.whole: dict[str, Any] = json.loads(last)
        self.rows: list[dict[str, Any]] = self.whole["rows"]
        assert len(table) == len(self.rows) + 1
        assert self.whole["fingerprint"]["torch"]
        for row, line in zip(self.rows, table[1:], strict=True):
            assert line.startswith(row["name"])
            assert len(row["runs"]) == 1
            assert row["median"] == row["runs"][0]
            assert ("MISSED" in line, "met" in line) == (row["met"] is False, row["met"] is True)

    def names(self) -> list[str]:
        return [row["name"] for row in self.rows]

    def __getitem__(self, name: str) -> float:
        (found,) = (row["median"] for row in self.rows if row["name"] == name)
        return float(found)

    def under(self, name: str) -> dict[str, float]:
        """A row and those that are set in below it."""
        at = self.names().index(name)
        found = {name: self.rows[at]["median"]}
        for row in self.rows[at + 1 :]:
            if not row["name"].startswith(" "):
                break
            found[row["name"].strip()] = row["median"]
        return found


def bench(name: str, model: Path, runs: Path, *arguments: object) -> Document:
    """Runs a benchmark once; it has to end as its targets are met."""
    command = [Path(sys.executable).parent / "coldframe", "bench", name, model, "--runs", 1]
    cache = Path(__file__).parents[2] / "build" / "vllm-cache"
    done = subprocess.run(
        [str(word) for word in (*command, *arguments)],
        capture_output=True,
        text=True,
        env={
            **without_settings(),
            "COLDFRAME_RUN_DIR": str(runs),
            # Without it vLLM starts a process to look at each kind of model.
            "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(cache)),
        },
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return Document(done)


def test_a_load(demo_model: Make, no_leaks: Path) -> None:
    only = ("--only", "in place,vLLM's own", "--dtype", "float32", "--speed")
    found = bench("vllm-load", demo_model(), no_leaks, *only)
    assert found.whole["same_tokens"] is True
    own = found.under("vLLM's own: loading weights")
    ours = found.under("in place: loading weights")
    for name, start in (("vLLM's own", own), ("in place", ours)):
        assert 0 < start[f"{name}: loading weights"] < start["load_model"]
        assert start["private memory"] > 100  # MB: torch and vLLM are in it
        assert min(start["prefill"], start["decode"]) > 0
    for what in ("load_model", "prefill", "decode"):
        title = f"in place / vLLM's own: {what.replace('_', ' ')}"
        assert found[title] == pytest.approx(ours[what] / own[what])
    assert found["in place / vLLM's own: weights"] == pytest.approx(
        ours["in place: loading weights"] / own["vLLM's own: loading weights"]
    )
    less = own["private memory"] - ours["private memory"]
    assert found["in place: private memory less"] == pytest.approx(less)


def test_gates(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model()
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    arguments = ("--only", "gated,whole", "--rate", f"{weights // 3}B/s", "--dtype", "float32")
    found = bench("vllm-gated", model, no_leaks, *arguments)
    assert found.whole["weights_bytes"] == weights
    link = found["the weights on the link"]
    assert link == pytest.approx(3, rel=0.01)
    cells = {name: found.under(f"{name}: first token") for name in ("gated", "whole")}
    for name, cell in cells.items():
        # Neither can be done before the last byte is.
        assert cell[f"{name}: first token"] > max(link, cell["engine up"])
    # Without gates the start waits for it; with them the first token does.
    assert cells["whole"]["engine up"] > link
    ratio = cells["gated"]["gated: first token"] / cells["whole"]["whole: first token"]
    assert found["first token: gated / whole"] == pytest.approx(ratio)


def test_a_handoff(demo_model: Make, no_leaks: Path) -> None:
    model, tokens = demo_model(), 70
    config = json.loads((model / "config.json").read_text())
    values = 2 * config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]
    arguments = ("--only", "layered", "--tokens", tokens)
    found = bench("vllm-handoff", model, no_leaks, *arguments)
    assert found.whole["tokens"] == tokens
    assert all(name.startswith("layered: ") for name in found.names())
    kv = f"layered: plain copy of {tokens * values * 4 / 1e6:.1f} MB"
    copy, copied = found["layered: of that, the copy"], found[kv]
    ready, first = (found["layered: KV ready, from the request on"], found["layered: first token"])
    assert 0 < copy < ready < first
    limit = 1.5 * copied + 20
    assert found["layered: KV ready / (1.5 plain copies + 20 ms)"] == pytest.approx(ready / limit)
    saved = found["layered: KV of a prefill put into the arena"]
    assert saved > 0
    assert found["layered: that / (1.5 plain copies + 20 ms)"] == pytest.approx(saved / limit)
    assert found["layered: first token without KV"] > 0
    assert found["layered: a decode step"] > 0


def test_a_bridge(demo_model: Make, no_leaks: Path) -> None:
    arguments = ("--batch", 2, "--tokens", 24, "--vllm-kv", "64MiB")
    found = bench("vllm-bridge", demo_model(), no_leaks, *arguments)
    assert (found.whole["runs"], found.whole["threads"] > 0) == (1, True)
    ratios = [row for row in found.rows if row["unit"] == "ratio"]
    assert len(ratios) == 3
    for (one, other), row in zip(list(pairwise(found.rows))[::3], ratios, strict=True):
        # Ours is above vLLM's, but for the first tokens.
        ours, theirs = (other, one) if row is ratios[0] else (one, other)
        assert one["unit"] == other["unit"]
        assert min(one["median"], other["median"]) > 0
        assert row["median"] == pytest.approx(ours["median"] / theirs["median"])
    speed = found["replica, batch 2: decode"]
    # No engine decodes with more processors than there are.
    used = found["replica's engine: processor time a token"] * speed
    assert used < 4 * found.whole["threads"]


def test_a_cold_start_of_its_own_server(demo_model: Make) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, prompt = demo_model(), [5 + (7 * i) % 400 for i in range(24)]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    asked = Asked(model, prompt, 6, vllm_python=sys.executable)
    outcome = open_contender("vllm", asked).start()
    assert outcome.tokens == tuple(ids[len(prompt) :])
    assert 1 < outcome.ttft_s < outcome.last_token_s
    assert outcome.memory is not None
    assert outcome.memory > 500 << 20


def test_a_handoff_from_token_to_token(demo_model: Make, no_leaks: Path) -> None:
    command = [Path(sys.executable).parent / "coldframe", "bench", "handoff", demo_model()]
    arguments = ["--ways", "shared,vllm", "--runs", "1", "--answer-tokens", "6"]
    lengths = ["--prompt-tokens", "40,300", "--busy", "0,2", "--vllm-python", sys.executable]
    done = subprocess.run(
        [*command, *arguments, *lengths],
        capture_output=True,
        text=True,
        env={**without_settings(), "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left_out"] == []
    cells = {cell["id"]: cell for cell in found["cells"]}
    assert len(cells) == 8
    for length in (40, 300):
        for busy in (0, 2):
            cell = cells[f"vllm/{length}/{busy}"]
            assert cell["tokens_equal"] is True  # float32: both engines draw the same
            assert cell["bytes"] == cells[f"shared/{length}/{busy}"]["bytes"]
            assert min(cell["second"]["median"], cell["step"]["median"]) > 0


def test_cold_starts_with_an_engine(demo_model: Make, no_leaks: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.json"
    blocks = [
        {"tier": ["fresh"], "cache": "warm", "engine": ["vllm", "bridge"]},
        {"tier": ["warm"], "cache": ["warm"], "engine": ["bridge"]},
    ]
    matrix.write_text(json.dumps({"matrix": blocks}))
    command = [Path(sys.executable).parent / "coldframe", "bench", "cold", demo_model()]
    arguments = ["--matrix", matrix, "--runs", 1, "--tokens", 6]
    engine = ["--vllm-python", sys.executable, "--vllm-kv", "64MiB"]
    done = subprocess.run(
        [str(word) for word in (*command, *arguments, *engine)],
        capture_output=True,
        text=True,
        env={**without_settings(), "COLDFRAME_RUN_DIR": str(no_leaks), "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    cells = {cell["id"]: cell for cell in found["cells"]}
    alone, bridge, warm = (
        f"{tier}/warm/disk/{engine}/http"
        for tier, engine in (("fresh", "vllm"), ("fresh", "bridge"), ("warm", "bridge"))
    )
    assert set(cells) == {alone, bridge, warm}
    for cell in cells.values():
        assert cell["tokens_equal"] is True  # float32: both engines draw the same
        assert 0 < cell["ttft"]["median"] < cell["last_token"]["median"]
        path = [share["seconds"]["runs"][0] for share in cell["path"]]
        assert sum(path) == pytest.approx(cell["ttft"]["median"])
        assert cell["memory"]["median"] > 200 << 20
    # The first token is the native workers', and with the engine alone the second waits for it.
    behind = [cells[name]["last_token"]["median"] - cells[name]["ttft"]["median"] for name in cells]
    assert behind[list(cells).index(alone)] == max(behind)
    assert cells[warm]["ttft"]["median"] < cells[bridge]["ttft"]["median"]
    # What a plan may say, and why it says nothing of the rest.
    assert cells[bridge]["prediction"]["ttft_s"] > 0
    assert "vLLM engine" in cells[bridge]["prediction"]["why"]
    assert cells[alone]["prediction"] is None
    (left_out,) = found["left_out"]
    assert left_out["what"] == f"the prediction of {alone}"
    assert "beside the workers" in left_out["why"]
