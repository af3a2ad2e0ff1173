from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from coldframe.benchmarks.document import SCHEMA
from coldframe.benchmarks.traffic import advise
from coldframe.benchmarks.traffic.played import PARKED_SHARE
from coldframe.benchmarks.traffic.stages import Line, Times
from coldframe.benchmarks.traffic.times import DEFAULTS, of_plan, read_times
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.flags.parser import Parser

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TIMES = Times(
    fresh=[8.0],
    restored=[2.0],
    parked=[0.5],
    end=[0.0],
    prefill=Line(0.0, 0.01),
    decode=Line(0.0, 0.0),
    how="made up",
)


def write_trace(path: Path, moments: list[float]) -> Path:
    began = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [f"{(began + timedelta(seconds=moment)).isoformat()},100,1\n" for moment in moments]
    path.write_text(HEAD + "".join(rows))
    return path


def write_times(path: Path, times: Times = TIMES) -> Path:
    path.write_text(json.dumps(times.to_json()))
    return path


def advised(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    parser = Parser()
    advise.add_arguments(parser)
    assert advise.run(parser.parse([str(argument) for argument in arguments])) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    return found


def refused(*arguments: object) -> ColdframeError:
    parser = Parser()
    advise.add_arguments(parser)
    with pytest.raises(ColdframeError) as caught:
        advise.run(parser.parse([str(argument) for argument in arguments]))
    return caught.value


def by_hand(moments: list[float], idle_s: float | None, start_s: float, wake_s: float) -> Any:
    """One model, one request at a time: TTFTs, seconds held, seconds parked, cold starts.

    Written down anew, gap by gap, without events or states.

    Args:
        moments: When somebody asks.
        idle_s: How long it is kept warm; None for ever, and warm from the beginning.
        start_s: From zero.
        wake_s: From parked, where it is parked for ever; negative where it goes to zero.
    """
    first, held, parked, cold = [], 0.0, 0.0, 0
    free = None if idle_s is not None else 0.0
    since = None if idle_s is not None else 0.0
    for moment in moments:
        late = 0.0
        if free is None:
            late, since, cold = start_s, moment, cold + 1
            free = moment
        elif idle_s is not None and moment > free + idle_s:
            assert since is not None
            held += free + idle_s - since
            since = moment
            if wake_s < 0:
                late, cold = start_s, cold + 1
            else:
                late = wake_s
                parked += moment - free - idle_s
        free = max(free, moment) + late + 1.0
        first.append(free - moment)
    assert free is not None
    assert since is not None
    return first, held + free - since, parked, cold


def test_choices_cost_what_they_do_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = np.random.default_rng(5)
    # Gaps that are never near a keep-alive, and longer than what comes before them takes.
    gaps = chance.choice([12.0, 15.0, 25.0, 40.0, 300.0], size=60)
    moments = [0.0, *np.cumsum(gaps).tolist()]
    trace = write_trace(tmp_path / "trace.csv", moments)
    found = advised(
        capsys,
        *("--trace", trace, "--times", write_times(tmp_path / "times.json")),
        *("--slo", "5s", "--price", 7.2, "--parked-price", 0.9, "--idle", "10,20"),
    )
    choices = {choice["name"]: choice for choice in found["choices"]}
    expected = {
        "always on": by_hand(moments, None, 0.0, -1),
        "parked, idle 10 s": by_hand(moments, 10.0, 2.0, 0.5),
        "parked, idle 20 s": by_hand(moments, 20.0, 2.0, 0.5),
        "snapshot + zero, idle 10 s": by_hand(moments, 10.0, 2.0, -1),
        "plain zero, idle 10 s": by_hand(moments, 10.0, 8.0, -1),
        "plain zero, idle 20 s": by_hand(moments, 20.0, 8.0, -1),
    }
    for name, (first, held, parked, cold) in expected.items():
        choice = choices[name]
        assert choice["cold_starts"] == cold, name
        assert choice["cold_share"] == pytest.approx(cold / len(moments))
        assert choice["gpu_s"] == pytest.approx(held), name
        assert choice["parked_s"] == pytest.approx(parked), name
        assert choice["cost"] == pytest.approx(held * 0.002 + parked * 0.00025), name
        assert choice["p99_s"] == pytest.approx(np.percentile(first, 99)), name
        assert choice["p50_s"] == pytest.approx(np.percentile(first, 50)), name
        assert choice["meets_slo"] == (np.percentile(first, 99) <= 5.0)
    # What reckons with prices reckons with these.
    assert choices["next"]["policy"] == "next:parked=0.125"
    hours = (moments[-1] + 1.0) / 3600
    assert choices["always on"]["cost"] == pytest.approx(7.2 * hours)
    good = {name: choice["cost"] for name, choice in choices.items() if choice["meets_slo"]}
    assert found["take"] == min(good, key=lambda name: good[name]) == "snapshot + zero, idle 10 s"
    assert "3.00 s" in found["why"] or "cheapest" in found["why"]
    assert {left["what"] for left in found["left_out"]} == {"warm pool"}


def test_what_is_taken_follows_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [100.0 * number for number in range(30)])
    files = ("--trace", trace, "--times", write_times(tmp_path / "times.json"), "--price", 3.6)
    taken = {
        slo: advised(capsys, *files, "--slo", slo, "--idle", "5")
        for slo in ("10s", "3500ms", "1.6", "1.2s", "0.5s")
    }
    assert taken["3500ms"]["take"] == "snapshot + zero, idle 5 s"
    assert taken["3500ms"]["slo_s"] == pytest.approx(3.5)
    # Of the start of the first day no policy has heard; one of a hundred may be as late.
    assert taken["1.2s"]["take"] == "always on"
    assert taken["0.5s"]["take"] == "always on"
    assert "None has 99 %" in taken["0.5s"]["why"]
    assert not any(choice["meets_slo"] for choice in taken["0.5s"]["choices"])
    half = advised(capsys, *files, "--slo", "1.6", "--idle", "5", "--slo-percentile", "90")
    assert half["take"] == "parked, idle 5 s"
    assert half["parked_price"] == pytest.approx(3.6 * PARKED_SHARE)


def test_who_is_as_good_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "trace.csv", [float(number) for number in range(200)])
    found = advised(
        capsys,
        *("--trace", trace, "--times", write_times(tmp_path / "times.json")),
        *("--slo", "1m", "--price", 1, "--models", 3),
    )
    # Nobody is ever left alone for a minute: all choices are one.
    assert len(found["near_ties"]) >= 3
    assert all(name in found["why"] for name in found["near_ties"])
    assert found["take"] not in found["near_ties"]
    assert {"warm pool of 1, idle 60 s", "warm pool of 2, idle 60 s"} <= {
        choice["name"] for choice in found["choices"]
    }


def test_what_there_is_not_enough_of_is_in_every_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [20.0 * number for number in range(30)])
    flags = ("--trace", trace, "--times", write_times(tmp_path / "times.json"))
    flags = (*flags, "--slo", "20s", "--price", 3.6, "--models", 2, "--idle", "300")
    alone = advised(capsys, *flags)
    assert (alone["sharing"], alone["budget"]) == (None, None)
    sizes = ("--device-memory", "40GiB", "--weights", "20GiB,10GiB", "--kv-memory", "4GiB")
    shared = advised(capsys, *flags, *sizes, "--device", "cpu")
    assert [takes["warm"] for takes in shared["sharing"]["takes"]] == [24 << 30, 14 << 30]
    small = advised(capsys, *flags, *sizes[2:], "--device-memory", "30GiB", "--device", "cpu")

    def cold(found: dict[str, Any], name: str = "snapshot + zero, idle 300 s") -> int:
        (choice,) = [one for one in found["choices"] if one["name"] == name]
        return int(choice["cold_starts"])

    # Both are kept where both fit; else they take turns.
    assert cold(alone) == cold(shared) == 2
    assert cold(small) > 2
    assert cold(small, "always on") > 0
    # A device that they share is paid for once.
    prices = {name: found["choices"][0]["cost"] for name, found in (("a", alone), ("s", shared))}
    assert prices["s"] == pytest.approx(prices["a"] / 2)
    # And of a budget not much is left by then.
    limited = advised(capsys, *flags, "--budget", 60)
    assert limited["budget"] == 60
    assert cold(limited) > 2
    always = next(one for one in limited["choices"] if one["name"] == "always on")
    assert always["gpu_s"] < 0.5 * alone["choices"][0]["gpu_s"]


def test_times_that_are_not_known_leave_choices_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [0.0, 100.0])
    some = Times([3.0], [], [], [], Line(0, 0.01), Line(0, 0), "made up")
    found = advised(
        capsys,
        *("--trace", trace, "--times", write_times(tmp_path / "times.json", some)),
        *("--slo", "9s", "--price", 1, "--models", 2),
    )
    names = [choice["name"] for choice in found["choices"]]
    assert not any(name.startswith(("snapshot", "parked", "warm pool")) for name in names)
    assert [left["what"] for left in found["left_out"]] == ["snapshot + zero", "parked"]
    plain = advised(capsys, "--trace", trace, "--slo", "9s", "--price", 1)
    assert "another machine's" in plain["start_times"]["how"]


def cell(tier: str, first: list[float], through: str = "http", **more: object) -> dict[str, Any]:
    found = {
        "who": "coldframe",
        "tier": tier,
        "engine": "native",
        "through": through,
        "source": "disk",
        "cache": "warm",
        "throttle": None,
        "ttft": {"median": float(np.median(first)), "runs": first},
        "last_token": {"runs": [run + 0.3 for run in first]},
    }
    return found | more


def test_times_are_read_of_a_document_of_cold_starts(tmp_path: Path) -> None:
    cells = [
        cell("warm", [0.1, 0.2, 0.3]),
        cell("fresh", [9.0], through="run"),
        cell("fresh", [1.2, 1.4]),
        cell("fresh", [5.0], throttle=1e6),
        cell("fresh", [7.0], who="vllm"),
        cell("restored", [0.5]),
        cell("parked", [0.1]),
    ]
    told = {"kind": "cold", "cells": cells, "prompt_tokens": 40, "answer_tokens": 16}
    file = tmp_path / "cold.json"
    file.write_text(f"a table\n{json.dumps(told)}\n")
    times = read_times(file)
    assert times.fresh == pytest.approx([1.0, 1.2])
    assert times.restored == pytest.approx([0.3])
    assert times.parked == [0.0]
    assert times.prefill(80) == pytest.approx(0.4)
    assert times.decode(1) == pytest.approx(0.02)
    assert times.end == DEFAULTS.end
    again = Times.from_json(json.loads(json.dumps(times.to_json())), "here")
    assert again.to_json() == times.to_json() | {"how": f"here: {times.how}"}


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[]", "{}", '{"kind": "cold", "cells": []}', '{"kind": "cold"}']
)
def test_what_has_no_times_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "times.json"
    file.write_text(content)
    with pytest.raises(RequestError):
        read_times(file)
    with pytest.raises(RequestError):
        read_times(tmp_path / "none.json")


def test_times_are_predicted() -> None:
    def start(tier: str, ttft_s: float | None, through: str = "http", cache: str = "warm") -> Any:
        return {"tier": tier, "through": through, "cache": cache, "ttft_s": ttft_s}

    plain = of_plan({"predicted_ttft_s": 3.0}, "m")
    assert (plain.fresh, plain.restored, plain.parked) == ([3.0], [], DEFAULTS.parked)
    starts = [
        start("fresh", 9.0, cache="cold"),
        start("fresh", 2.0),
        start("fresh", 1.0, through="run"),
        start("restored", None),
        start("restored", 0.7, cache="cold"),
        start("parked", 0.3),
        start("warm", 0.2),
    ]
    found = of_plan({"predicted_ttft_s": 3.0, "starts": starts}, "m")
    assert found.fresh == pytest.approx([1.8])
    assert found.restored == pytest.approx([0.5])
    assert found.parked == pytest.approx([0.1])
    assert "plan m" in found.how


@pytest.mark.heavy
def test_a_checkpoint_is_advised_on(
    demo_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [0.0, 100.0])
    found = advised(capsys, "--trace", trace, "--slo", "60s", "--price", 1, "--model", demo_model())
    assert found["start_times"]["fresh"][0] > 0
    assert "coldframe plan" in found["start_times"]["how"]
    assert found["take"] != "always on"


def test_stages_take_no_time_that_there_is_not(tmp_path: Path) -> None:
    wrong = TIMES.to_json() | {"fresh": [-1.0]}
    with pytest.raises(RequestError, match="cannot take so long"):
        Times.from_json(wrong, "here")


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.csv", [0.0, 1.0])
    good = {"--trace": trace, "--slo": "1s", "--price": 1}

    def with_flags(**flags: object) -> str:
        told = good | {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        error = refused(*(f"{flag}={value}" for flag, value in told.items()))
        assert isinstance(error, RequestError)
        return str(error)

    for name in ("slo", "price"):
        left = [str(part) for flag in good.items() if flag[0] != f"--{name}" for part in flag]
        assert f"--{name}" in str(refused(*left))
    assert "--trace" in str(refused("--slo", "1s", "--price", 1))
    for slo in ("0", "-1s", "soon", "1h", ""):
        assert "--slo" in with_flags(slo=slo)
    for price in ("-1", "nan", "inf", "1e9"):
        assert "--price" in with_flags(price=price)
    assert "--parked-price" in with_flags(parked_price="-0.1")
    for percentile in ("0", "101", "nan"):
        assert "--slo-percentile" in with_flags(slo_percentile=percentile)
    assert "--models" in with_flags(models="0")
    assert "--policy" in with_flags(policy="fixed:1,2,3")
    assert "no such policy" in with_flags(policy="whatever")
    assert "--policy" in with_flags(policy="fixed:-1")
    assert "--idle" in with_flags(idle="never")
    assert "--idle" in with_flags(idle="-3")
    assert "--pool" in with_flags(pool="0")
    assert "--context" in with_flags(context="3")
    assert "--seconds" in with_flags(seconds="0")
    assert "--speed" in with_flags(speed="-2")
    assert "--seconds, --speed" in with_flags(speed="2", seconds="3")
    assert "--from" in with_flags(**{"from": "100"})
    assert "no such directory" in with_flags(model=tmp_path / "none")
    assert "--times, --model" in with_flags(model=tmp_path, times=trace)
    assert "--budget" in with_flags(budget="0")
    assert "--budget" in with_flags(budget="nan")
    assert "--device-memory" in with_flags(device_memory="1GB")
    assert "--device-memory" in with_flags(weights="1GB")
    assert "--device-memory" in with_flags(host_memory="1GB")
    assert "--weights" in with_flags(device_memory="1GB", weights="none")
    assert "--weights" in with_flags(device_memory="1GB", weights="1GB,2GB")


def test_the_command_says_what_to_take_without_torch(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.csv", [0.0, 100.0])
    code = (
        "import sys; from coldframe.runtime.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    out = tmp_path / "found.json"
    arguments = ["advise", "--trace", str(trace), "--slo", "3s", "--price", "2"]
    arguments += ["--output", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert f"take: {found['take']}" in table
    assert json.loads(out.read_text()) == found
    for choice in found["choices"]:
        row = next(line for line in table if line.startswith(f"{choice['name']} "))
        assert f"{choice['cost']:.4g}" in row
