from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.benchmarks.crowd import overtaken
from coldframe.benchmarks.http_client import Connection, completion, knock
from coldframe.loader.errors import PlatformError


def test_who_was_overtaken() -> None:
    assert overtaken([]) == 0
    assert overtaken([1, 2, 2, 3]) == 0
    assert overtaken([3, 1, 2, 4]) == 2  # two came behind the first and were served before it
    assert overtaken([1, 4, 2, 3, 5]) == 2


def peer(parts: list[bytes], pause_s: float = 0.0) -> tuple[Connection, threading.Thread]:
    """A connection to somebody who reads a request and answers with those parts."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with theirs:
            theirs.recv(1 << 16)
            for part in parts:
                theirs.sendall(part)
                time.sleep(pause_s)

    thread = threading.Thread(target=answer)
    thread.start()
    return Connection(ours, 10.0), thread


def test_the_client_takes_the_time_of_the_first_event_and_of_the_end() -> None:
    head = b"HTTP/1.1 200 OK\r\nServer-Timing: queue;dur=0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    events = [b'data: {"a": 1}\n\n', b'data: {"b": 2}\n\n', b"data: [DONE]\n\n"]
    chunks = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    connection, thread = peer([head, *chunks, b"0\r\n\r\n"], 0.02)
    with connection:
        answer = connection.post("/", b"{}")
    thread.join()
    assert answer.body == b"".join(chunks) + b"0\r\n\r\n"
    assert answer.headers["server-timing"] == "queue;dur=0.1"
    # Whatever this process was doing meanwhile: one pause lies before the first event, four before
    # the end.
    assert answer.first_ns - answer.sent_ns >= 20e6
    assert answer.last_ns - answer.sent_ns >= 80e6
    assert answer.first_ns < answer.last_ns
    assert answer.seconds == (answer.last_ns - answer.sent_ns) / 1e9


def test_the_client_reads_bodies_of_either_kind_in_whatever_parts() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    nothing = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    for raw, body in (
        (whole, b"hello"),
        (chunked, b"5\r\nhello\r\n0\r\n\r\n"),
        (nothing, b"0\r\n\r\n"),
    ):
        for parts in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
            connection, thread = peer(parts)
            with connection:
                assert connection.get("/").body == body
            thread.join()


def test_the_client_does_not_time_refusals_or_broken_answers() -> None:
    refused = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nlate"
    connection, thread = peer([refused])
    with connection, pytest.raises(PlatformError, match="503 b'late'"):
        connection.get("/")
    thread.join()
    connection, thread = peer([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
    with connection, pytest.raises(PlatformError, match="broke off"):
        connection.get("/")
    thread.join()


def test_knocking_ends_when_somebody_listens_or_the_time_is_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with pytest.raises(PlatformError, match="nobody listens"):
            knock(port, time.monotonic_ns() + 20_000_000)
        timer = threading.Timer(0.05, listener.listen)
        timer.start()
        knock(port, time.monotonic_ns() + 10_000_000_000).close()
        timer.join()


def test_both_servers_are_asked_for_exactly_so_many_tokens() -> None:
    body = json.loads(completion("m", [1, 2], 3, stream=True))
    assert body["max_tokens"] == 3
    assert body["ignore_eos"] is True
    assert body["prompt"] == [1, 2]


def test_what_cannot_be_measured_is_refused_before_anything_starts(
    demo_model: Callable[..., Path], tmp_path: Path
) -> None:
    command = [Path(sys.executable).parent / "coldframe", "bench", "endpoint"]
    for arguments, word in (
        ([tmp_path / "none"], "no such directory"),
        ([demo_model("llama", "bfloat16"), "--runs", "0"], "--runs"),
        ([demo_model("llama", "bfloat16"), "--vllm-python", tmp_path / "none"], "bench-vllm"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert word in done.stderr
        assert not done.stdout


@pytest.mark.heavy
def test_the_benchmark_runs_and_ends_in_one_document(
    demo_model: Callable[..., Path], no_leaks: Path
) -> None:
    # The figures of so small a model mean nothing: what counts is that each is there.
    command = [Path(sys.executable).parent / "coldframe", "bench", "endpoint"]
    done = subprocess.run(
        [
            *(*command, demo_model("llama", "bfloat16"), "--runs", "1"),
            *("--clients", "20", "--pairs", "4"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    *table, last = done.stdout.splitlines()
    document = json.loads(last)
    rows: list[dict[str, Any]] = document["rows"]
    assert len(table) == len(rows) + 1
    assert document["left_out"]["vllm"]
    met = [row["met"] for row in rows if row["target"] is not None]
    assert done.returncode == (0 if all(met) else 1)
    for row in rows:
        assert row["runs"], row["name"]
        assert min(row["runs"]) <= row["median"] <= max(row["runs"])
    found = {row["name"]: row["median"] for row in rows}
    assert found["20 at once, cold: answered"] == 20
    assert found["  overtaken"] == 0
    assert found["somebody listens, from the exec"] < found["the gateway accepts, from the exec"]
    for more, http, run in zip(rows, rows[1:], rows[2:], strict=False):
        if more["name"].endswith("that of `coldframe run`"):
            assert more["runs"][0] == pytest.approx(http["runs"][0] - run["runs"][0])
            assert min(http["runs"][0], run["runs"][0]) > 0
    parts = [found[f"  {name}"] for name in ("front", "gateway", "templates")]
    assert min(parts) > 1
    assert found["idle: PSS of the endpoint's own processes"] == pytest.approx(sum(parts))
    assert found["  gateway's peak RSS"] > found["  gateway"]
