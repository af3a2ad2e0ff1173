from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coldframe.benchmarks.document import SCHEMA, percentile
from coldframe.benchmarks.traffic.arrivals import Lengths, Traffic
from coldframe.benchmarks.traffic.one_process import OneProcess
from coldframe.loader.errors import PlatformError

Make = Callable[..., Path]
COMMAND = [str(Path(sys.executable).parent / "coldframe"), "bench", "serve"]
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.5319600,4808,40
2023-11-16 18:17:03.8319600,3180,8
2023-11-16 18:17:04.0319600,110,27
2023-11-16 18:17:04.4319600,7433,14
"""


def bench(runs: Path, *arguments: object) -> tuple[list[str], dict[str, Any], int]:
    """The table, the document and the exit status."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(runs)},
        check=False,
    )
    assert done.stdout, done.stderr
    *table, last = done.stdout.splitlines()
    document: dict[str, Any] = json.loads(last)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    return table, document, done.returncode


def check_load(load: dict[str, Any], runs: int) -> None:
    """What must be so of a load's figures on any machine."""
    whole = load["all"]
    assert len(load["runs"]) == runs
    for one in (whole, *load["runs"]):
        became = [one[name] for name in ("answered", "refused", "wrong", "failed")]
        assert sum(became) == one["requests"]
        assert became == [one["requests"], 0, 0, 0], one["errors"]
        for name in ("ttft", "e2e", "itl", "lateness"):
            spread = one[name]
            assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]
        assert one["ttft"]["p50"] <= one["e2e"]["p50"]
        assert one["ttft"]["count"] == one["requests"]
        assert one["tokens_rate"] == pytest.approx(one["answer_tokens"] / one["seconds"])
        assert 0 <= one["goodput"]["good"] <= one["requests"]
    for name in ("requests", "answer_tokens", "prompt_tokens"):
        assert whole[name] == sum(one[name] for one in load["runs"])
    shares = [one["goodput"]["share"] for one in load["runs"]]
    assert load["figures"]["goodput_share"]["runs"] == shares
    assert load["figures"]["goodput_share"]["median"] == percentile(shares, 0.5)


@pytest.mark.heavy
def test_rates_are_offered_to_each_way_in_turn(demo_model: Make, no_leaks: Path) -> None:
    arguments = (
        "--ways",
        "apart,together,vllm",
        "--rate",
        "20,40",
        "--seconds",
        "1",
        "--runs",
        "2",
    )
    lengths = ("--prompt-tokens", "8-64", "--answer-tokens", "4")
    model = demo_model("llama", "float32")
    table, found, status = bench(no_leaks, model, *arguments, *lengths)
    assert status == 0
    assert [(load["way"], load["rate"]) for load in found["loads"]] == [
        ("apart", 20),
        ("together", 20),
        ("apart", 40),
        ("together", 40),
    ]
    for load in found["loads"]:
        check_load(load, 2)
    first, second = (load["all"] for load in found["loads"][:2])
    assert first["prompt_tokens"] == second["prompt_tokens"]  # the same requests
    assert first["answer_tokens"] == second["answer_tokens"] == 4 * first["requests"]
    (missing,) = found["left_out"]
    assert missing["what"] == "vllm"
    assert "--vllm-python" in missing["why"]
    for entry, rate in zip(found["compared"], (20, 40), strict=True):
        assert (entry["way"], entry["beside"], entry["rate"]) == ("apart", "together", rate)
        loads = {load["way"]: load["all"] for load in found["loads"] if load["rate"] == rate}
        ratio = loads["apart"]["itl"]["p99"] / loads["together"]["itl"]["p99"]
        assert entry["itl_p99"] == pytest.approx(ratio)
    for line, load in zip(table[1:], found["loads"], strict=False):
        assert line.split()[:3] == [
            load["way"],
            f"{load['rate']:.3g}",
            str(load["all"]["requests"]),
        ]


@pytest.mark.heavy
def test_the_highest_rate_is_searched_and_a_trace_followed(
    demo_model: Make, no_leaks: Path, tmp_path: Path
) -> None:
    model = demo_model("llama", "float32")
    out = tmp_path / "found.json"
    slo = ("--slo-ttft", "200ms", "--slo-itl", "10s", "--slo-itl-at", "max")
    search = ("--rate", "auto", "--seconds", "0.1", "--runs", "1", "--prompt-tokens", "8")
    once = ("--ways", "together", "--answer-tokens", "2", "--json", "--output", out)
    table, found, status = bench(no_leaks, model, *search, *once, *slo)
    assert (table, status) == ([], 0)
    assert json.loads(out.read_text()) == found
    (highest,) = found["highest"]
    # How much it serves is this machine's; but no rate below is known to be too much.
    good = [probe["rate"] for probe in highest["probes"] if probe["share"] >= 0.9]
    bad = [probe["rate"] for probe in highest["probes"] if probe["share"] < 0.9]
    assert highest["rate"] == max((r for r in good if r < min(bad, default=r + 1)), default=None)
    assert [load["rate"] for load in found["loads"]] == [highest["rate"]] * bool(good)
    for load in found["loads"]:
        check_load(load, 1)

    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    follow = ("--trace", trace, "--seconds", "0.8", "--runs", "1", "--ways", "together")
    _, found, status = bench(no_leaks, model, *follow)
    assert status == 0
    assert found["arrivals"]["kind"] == "trace"
    (load,) = found["loads"]
    assert (load["rate"], load["all"]["requests"]) == (None, 3)
    check_load(load, 1)
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    assert found["arrivals"]["scale"] == pytest.approx((context - 2) / 4848)


@pytest.mark.heavy
def test_one_process_makes_the_tokens_that_were_asked_for(
    demo_model: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    model = demo_model("llama", "float32")
    traffic = Traffic(0.5, Lengths(8, 100), Lengths(1, 9), 256, 500)
    asks = traffic.load(40.0, 3)
    with OneProcess(model, traffic.longest) as process:
        for _ in range(2):
            records = process.offer(asks)
            assert [one.tokens for one in records] == [ask.tokens for ask in asks]
            for one in records:
                assert one.answered
                assert one.token_s == sorted(one.token_s)
                assert one.token_s[0] > one.due_s == one.sent_s
    with OneProcess(model / "none", 64) as process, pytest.raises(PlatformError, match="failed"):
        process.offer(asks)
    assert str(model / "none") in capfd.readouterr().err


def test_what_makes_no_sense_is_refused_before_anything_starts(
    demo_model: Make, tmp_path: Path
) -> None:
    from coldframe.benchmarks.traffic import serve
    from coldframe.loader.errors import RequestError
    from coldframe.runtime.flags.parser import Parser

    parser = Parser()
    serve.add_arguments(parser)
    parser.flag("--device", default="cpu")
    model = str(demo_model("llama", "float32"))
    for arguments, word in (
        ([str(tmp_path / "none")], "no such directory"),
        ([model, "--runs", "0"], "--runs"),
        ([model, "--seconds", "-1"], "--seconds"),
        ([model, "--good", "1.5"], "--good"),
        ([model, "--ways", "apart,elsewhere"], "elsewhere"),
        ([model, "--ways", "vllm"], "nobody to answer"),
        ([model, "--ways", "vllm", "--vllm-python", str(tmp_path)], "no interpreter"),
        ([model, "--trace", str(tmp_path / "none.csv")], "no trace"),
        ([model, "--prompt-tokens", "100000"], "context"),
        ([model, "--output", str(tmp_path / "none" / "out.json")], "--output"),
    ):
        with pytest.raises(RequestError, match=word):
            serve.run(parser.parse(arguments))
    for wrong in (["--rate", "fast"], ["--rate", "0"], ["--slo-ttft", "9h"], ["--slo-itl-at", "x"]):
        with pytest.raises(SystemExit):
            parser.parse([model, *wrong])
