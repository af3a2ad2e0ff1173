from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coldframe.benchmarks.document import SCHEMA
from coldframe.benchmarks.traffic import advise, replay
from coldframe.benchmarks.traffic.played import Asked, Played, Stay
from coldframe.benchmarks.traffic.policies import Chosen, fixed, policy, served
from coldframe.benchmarks.traffic.sharing import Shared, sharing, sharing_of_weights
from coldframe.benchmarks.traffic.stages import Line, Times
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError, PlatformError, RequestError
from coldframe.runtime.flags.parser import Parser

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ONCE = ["starting", "warm"]
TIMES = Times([2.0], [], [0.1], [0.05], Line(0.01, 0.0), Line(0.01, 0.0), "made up")


def write_trace(path: Path, moments: list[float]) -> Path:
    began = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [f"{(began + timedelta(seconds=moment)).isoformat()},64,8\n" for moment in moments]
    path.write_text(HEAD + "".join(rows))
    return path


def arguments(*texts: object) -> Any:
    parser = Parser()
    replay.add_arguments(parser)
    parser.flag("--device", default="cpu")
    return parser.parse([str(text) for text in texts])


def seconds_in(played: dict[str, Any], *states: str) -> float:
    return sum(
        stay["end_s"] - stay["start_s"]
        for stays in played["states"].values()
        for stay in stays
        if stay["state"] in states
    )


def valid(document: dict[str, Any]) -> dict[str, Any]:
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    for part in filter(None, (document["live"], document["simulated"])):
        for name, stays in part["states"].items():
            assert stays[0]["start_s"] == 0, name
            assert stays[-1]["end_s"] == pytest.approx(part["seconds"])
            assert all(a["end_s"] == b["start_s"] for a, b in pairwise(stays)), name
        assert part["gpu_s"] == pytest.approx(seconds_in(part, "starting", "warm", "draining"))
        assert part["parked_s"] == pytest.approx(seconds_in(part, "parked"))
        every = [*part["asked"], *part["unanswered"]]
        assert part["cold_starts"] == sum(asked["from"] == "zero" for asked in every)
        assert part["requests"] == len(every)
        assert part["refused"] + part["failed"] == len(part["unanswered"])
    return document


def test_a_trace_is_simulated_without_a_server(
    demo_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = tmp_path / "times.json"
    times.write_text(json.dumps(TIMES.to_json()))
    trace = write_trace(tmp_path / "trace.csv", [0.0, 10.0, 100.0, 103.0])
    flags = ("--trace", trace, "--times", times, "--simulate-only", "--price", "3.6")
    assert replay.run(arguments(demo_model(), *flags, "--policy", "fixed:20")) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = valid(json.loads(last))
    assert (found["live"], found["difference"]) == (None, None)
    played = found["simulated"]
    assert (played["requests"], played["cold_starts"]) == (4, 2)
    assert played["cost"] == pytest.approx(played["gpu_s"] / 1000)
    assert any(line.split() == ["cold", "starts", "2"] for line in table)
    # The keep-alive is not pressed together with the trace.
    assert replay.run(arguments(demo_model(), *flags, "--idle", "20", "--seconds", "10.3")) == 0
    pressed = valid(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert pressed["trace"]["speed"] == pytest.approx(10.0)
    assert pressed["simulated"]["starts"] == 1


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--models", "0"), "fewer models"),
        (("--idle", "soon"), "no time"),
        (("--park", "-1"), "no time"),
        (("--policy", "fixed:5", "--idle", "3"), "say the same"),
        (("--policy", "whatever"), "no such policy"),
        (("--pool", "-1"), "fewer than none"),
        (("--pool", "1", "--idle", "0"), "there must be some"),
        (("--pool", "1", "--policy", "next"), "fixed alone"),
        (("--pool", "1", "--policy", "histogram"), "fixed alone"),
        (("--tail", "-1"), "no time"),
        (("--output", "/none/out.json"), "cannot be written"),
        (("--price", "-1"), "no price"),
        (("--simulate-only",), "nothing can be measured"),
        (("--cycles", "0"), "must be one"),
        (("--speed", "0"), "no speed"),
        (("--from", "1000"), "nobody asks"),
    ],
)
def test_what_makes_no_sense_is_refused(
    demo_model: Callable[..., Path], tmp_path: Path, flags: tuple[str, ...], match: str
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [0.0, 1.0])
    with pytest.raises(RequestError, match=match):
        replay.run(arguments(demo_model(), "--trace", trace, *flags))
    with pytest.raises(RequestError, match="no such directory"):
        replay.run(arguments(tmp_path / "none", "--trace", trace))


def test_other_commands_settings_are_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDLE", "PARK", "POOL", "POLICY", "MODEL", "CONTEXT", "RATE", "STARTS", "SECONDS"):
        monkeypatch.setenv(f"COLDFRAME_{name}", "7")
    for command in (replay, advise):
        parser = Parser()
        command.add_arguments(parser)
        named = ["there"] if command is replay else []
        assert parser.parse(named) == parser.parse_args(named)


@pytest.mark.parametrize(
    ("chosen", "pool", "flags"),
    [
        (fixed(0.0), 0, ["--policy", "fixed:0"]),
        (fixed(None), 0, ["--policy", "fixed:never"]),
        (fixed(4.0, 2.5), 0, ["--policy", "fixed:4,2.5"]),
        (fixed(4.0, None), 0, ["--policy", "fixed:4,never"]),
        (policy("next:penalty=9"), 0, ["--policy", "next:penalty=9"]),
        (fixed(4.0, None), 2, ["--idle", "4", "--pool", "2"]),
        (fixed(None), 2, ["--pool", "2"]),
    ],
)
def test_a_server_follows_what_is_simulated(
    chosen: Chosen, pool: int, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_IDLE", "0.5")
    told, factory = served(chosen, pool)
    assert told == flags
    steps = chosen.factory().idle(0.0).steps
    # Who is in a pool stays parked.
    assert factory().idle(0.0).steps[: len(steps)] == steps[: 2 if pool else None]


def test_requests_that_were_not_answered_are_told_apart() -> None:
    asked = [
        Asked(0.0, "a", 1.0, "zero"),
        Asked(1.0, "a", 3.0, "warm"),
        Asked(2.0, "a", 99.0, "warm", "failed"),
        Asked(3.0, "a", None, "zero", "refused"),
    ]
    played = Played(asked, {"a": [Stay("warm", 0.0, 4.0)]}, 4.0).to_json(None)
    assert (played["requests"], played["failed"], played["refused"]) == (4, 1, 1)
    assert (played["cold_starts"], played["cold_share"]) == (2, 0.5)
    assert (played["ttft"]["p50"], played["ttft"]["max"]) == (2.0, 3.0)
    assert [one["outcome"] for one in played["unanswered"]] == ["failed", "refused"]
    with pytest.raises(PlatformError, match="no request"):
        Played(asked[2:], {}, 4.0).to_json(None)


@pytest.mark.heavy
def test_a_replay_goes_on_where_a_request_is_refused(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    times, out = tmp_path / "times.json", tmp_path / "found.json"
    times.write_text(json.dumps(TIMES.to_json()))
    trace = tmp_path / "trace.csv"
    began = "2024-01-01T00:00:0"
    trace.write_text(f"{HEAD}{began}0Z,16,4\n{began}0Z,200,8\n{began}1Z,16,4\n")
    # The second one takes more KV than there is.
    flags = ("--times", str(times), "--kv-memory", "128KiB", "--output", str(out))
    found = replayed(demo_model(), trace, no_leaks, *flags, status=1)
    live = found["live"]
    assert (live["requests"], live["refused"], live["failed"]) == (3, 1, 0)
    assert [one["at_s"] for one in live["asked"]] == sorted(one["at_s"] for one in live["asked"])
    assert len(live["asked"]) == 2
    assert any("KV" in error for error in live["errors"])
    assert json.loads(out.read_text()) == found
    assert found["tier"] == "fresh"
    assert found["models"][0]["path"] == str(demo_model())


def test_models_take_of_a_device_what_the_endpoint_reckons(
    demo_model: Callable[..., Path],
) -> None:
    model = demo_model()
    weights = sum(tensor.nbytes for tensor in Checkpoint.open(str(model)).tensors.values())
    found = sharing([model, model], Shared(64 << 20, 4 << 20, "cpu"))
    (one, other) = found.takes
    assert (found.memory, one.parked, one.host) == (64 << 20, weights, 0)
    assert one == other
    assert weights + (3 << 20) < one.warm <= weights + (4 << 20)
    gpu = sharing([model], Shared(8 << 30, 4 << 20, "cuda:0", 1 << 30)).of(3)
    assert (gpu.parked, gpu.host) == (0, weights)
    assert gpu.warm > weights + (1 << 30)
    with pytest.raises(ColdframeError):
        sharing([model], Shared(1 << 20, 4 << 20, "cpu"))
    # Where only sizes are known: with the KV that an endpoint would choose.
    told = sharing_of_weights([5 << 30, 2 << 30], Shared(40 << 30, None, "cpu"))
    assert [takes.warm for takes in told.takes] == [9 << 30, 6 << 30]
    assert told.of(7).parked == 2 << 30


def replayed(model: Path, trace: Path, runs: Path, *flags: str, status: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "coldframe", "bench", "replay", model),
            *("--trace", trace, "--cycles", "1", *flags),
        ],
        capture_output=True,
        text=True,
        # Settings of a server are none of a replay's.
        env={**os.environ, "COLDFRAME_RUN_DIR": str(runs), "COLDFRAME_LOG_LEVEL": "warning"},
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return valid(json.loads(done.stdout.splitlines()[-1]))


def assert_alike(live: dict[str, Any], simulated: dict[str, Any]) -> None:
    """The same states in the same order, and devices held alike within 5 %.

    But for what starts and ends took, each of which may be anything on a busy machine: these were
    drawn from other ones.
    """
    orders = []
    for part in (live, simulated):
        found = {
            name: [stay["state"] for stay in stays if stay["state"] != "draining"]
            for name, stays in part["states"].items()
        }
        orders.append(found)
        assert part["failed"] == part["refused"] == 0
    assert orders[0] == orders[1]
    assert [(a["model"], a["from"]) for a in live["asked"]] == [
        (a["model"], a["from"]) for a in simulated["asked"]
    ]
    for count in ("requests", "cold_starts", "starts"):
        assert live[count] == simulated[count], count
    apart = sum(
        abs(seconds_in(live, state) - seconds_in(simulated, state))
        for state in ("starting", "draining")
    )
    off = abs(live["gpu_s"] - simulated["gpu_s"])
    assert off <= 0.05 * live["gpu_s"] + apart, (live["gpu_s"], simulated["gpu_s"], apart)


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_a_simulation_is_as_the_replay(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    # Bursts that are shorter than any start takes, or gaps that leave it both its time to start
    # and its keep-alive.
    moments = [0.0, 0.2, 16.0, 16.1]
    trace = write_trace(tmp_path / "trace.csv", moments)
    found = replayed(demo_model(), trace, no_leaks, "--idle", "4", "--price", "3")
    live, simulated = found["live"], found["simulated"]
    assert (live["requests"], simulated["requests"]) == (4, 4)
    assert live["cold_starts"] == simulated["cold_starts"] == 4
    assert live["starts"] == simulated["starts"] == live["counted"]["starts"] == 2
    assert found["difference"]["cold_starts"] == 0
    # How long a start takes is another time with each: here as on a machine that is busy.
    for part in (live, simulated):
        assert seconds_in(part, "starting") > 0.3
    assert_alike(live, simulated)
    # What the server counts itself: the time in which there was a replica, which is there a bit
    # after the start has begun, and until somebody has read the count.
    assert live["counted"]["device_s"] == pytest.approx(live["gpu_s"], rel=0.5)
    states = [stay["state"] for stay in live["states"]["m0"] if stay["state"] != "draining"]
    assert states == [*(["zero"] if states[0] == "zero" else []), *ONCE, "zero", *ONCE]
    assert len(found["start_times"]["fresh"]) == 2


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_models_that_share_a_device_are_replayed(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    model = demo_model()
    weights = sum(tensor.nbytes for tensor in Checkpoint.open(str(model)).tensors.values())
    room = ("--device-memory", str(weights + (5 << 20)), "--kv-memory", str(4 << 20))
    trace = write_trace(tmp_path / "trace.csv", [0.0, 9.0, 18.0, 27.0])
    found = replayed(model, trace, no_leaks, "--models", "2", "--idle", "60", *room)
    live, simulated = found["live"], found["simulated"]
    models = [asked["model"] for asked in live["asked"]]
    # Each takes the other one's place.
    starts = 1 + sum(a != b for a, b in pairwise(models))
    assert starts > 1
    assert live["starts"] == simulated["starts"] == starts
    assert live["cold_starts"] == simulated["cold_starts"] == starts
    assert_alike(live, simulated)


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_who_may_be_held_is_simulated_as_it_is_live(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    """Three models, room for two, and a budget that is used up before the last ones are asked."""
    model = demo_model()
    weights = sum(tensor.nbytes for tensor in Checkpoint.open(str(model)).tensors.values())
    room = ("--device-memory", str(2 * (weights + (5 << 20))), "--kv-memory", str(4 << 20))
    moments = [0.0, 9.0, 18.0, 27.0, 45.0, 54.0]
    trace = write_trace(tmp_path / "trace.csv", moments)
    flags = ("--models", "3", "--idle", "600", "--budget", "30", "--tail", "12", *room)
    found = replayed(model, trace, no_leaks, *flags)
    live, simulated = found["live"], found["simulated"]
    assert found["budget"] == 30
    assert len(found["sharing"]["takes"]) == 3
    # The budget ends what the keep-alive would hold for ten minutes.
    names = {asked["model"] for asked in live["asked"]}
    assert len(names) > 1
    for part in (live, simulated):
        ended = [s for stays in part["states"].values() for s in stays if s["state"] == "zero"]
        assert len([s for s in ended if s["start_s"] > 0]) >= len(names)
    assert_alike(live, simulated)


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("criu")
def test_starts_from_an_image_are_replayed(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [0.0, 0.1, 14.0])
    model = demo_model("llama", "bfloat16")
    found = replayed(model, trace, no_leaks, "--starts", "image", "--idle", "4")
    assert found["tier"] == "restored"
    # All of them came from it: a start that could not would have been none (`require`).
    assert found["start_times"]["fresh"] == []
    assert len(found["start_times"]["restored"]) == 2
    live, simulated = found["live"], found["simulated"]
    assert live["starts"] == simulated["starts"] == live["counted"]["starts"] == 2
    assert live["cold_starts"] == 3
    assert_alike(live, simulated)
