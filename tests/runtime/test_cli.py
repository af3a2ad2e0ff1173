"""The console script as its users have it: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from coldframe.runtime.cli import COMMANDS
from tests.runtime.helpers import expected, prompt_of
from tests.support import without_settings

Make = Callable[..., Path]
COLDFRAME = str(Path(sys.executable).parent / "coldframe")
PROMPT = "Once upon a time, a replica slept at zero, and then a request"


def environment(runs: Path, **more: str) -> dict[str, str]:
    clean = without_settings()
    return {**clean, "COLDFRAME_RUN_DIR": str(runs), "COLDFRAME_SNAPSHOT": "off", **more}


def run(
    runs: Path, *arguments: object, code: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `coldframe run` with both outputs in pipes."""
    done = subprocess.run(
        [COLDFRAME, "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(runs, **env),
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done


def run_json(runs: Path, *arguments: object) -> dict[str, Any]:
    done = run(runs, *arguments, "--json")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@contextmanager
def started(runs: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`coldframe run`, going on; it is killed if it still runs in the end."""
    # Where the tests run in the background, a shell has had them ignore the signal, and children
    # inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [COLDFRAME, "run", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(runs),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.kill()


def eventually(done: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def throttle(model: Path, seconds: float) -> str:
    """A rate at which the model loads for so many seconds."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return f"{size / seconds:.0f}B/s"


# -- help and usage ---------------------------------------------------------------------------


def test_help_takes_little_of_the_processor() -> None:
    def cpu_seconds() -> float:
        actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        pid = os.posix_spawn(COLDFRAME, [COLDFRAME, "--help"], os.environ, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    # The least of several, since whoever shares the caches makes each of them dearer.
    assert min(cpu_seconds() for _ in range(5)) < 0.2


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import contextlib, sys\n"
        "from coldframe.runtime.cli import main\n"
        "with contextlib.suppress(SystemExit): main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors', 'psutil'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_help_names_every_command() -> None:
    done = subprocess.run([COLDFRAME], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, no_leaks: Path) -> None:
    done = subprocess.run(
        [COLDFRAME, name, "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment(no_leaks),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: coldframe {name} ")
    assert done.stderr == ""


def test_an_unknown_command_is_wrong_usage() -> None:
    done = subprocess.run([COLDFRAME, "fly"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "'fly'" in done.stderr
    assert "run" in done.stderr


def test_wrong_usage_leaves_nothing_behind(no_leaks: Path) -> None:
    # The memory service is on its way by the time that the arguments turn out to be wrong.
    done = run(no_leaks, "model", "-p", "x", "--throttle", "fast", code=2)
    assert done.stdout == ""
    assert "--throttle: 'fast' is no rate" in done.stderr
    eventually(lambda: not list(no_leaks.iterdir()) and not users_of(no_leaks))


def users_of(runs: Path) -> list[psutil.Process]:
    """The processes that were started with a folder in there, whoever is their parent now."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(runs) in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_wrong_value_in_the_environment_is_named(no_leaks: Path) -> None:
    done = run(no_leaks, "model", "-p", "x", code=2, COLDFRAME_THROTTLE="fast")
    assert "environment variable COLDFRAME_THROTTLE: 'fast'" in done.stderr
    eventually(lambda: not list(no_leaks.iterdir()))


# -- the answer -------------------------------------------------------------------------------


def test_in_a_pipe_there_is_the_answer_and_nothing_else(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    done = run(
        no_leaks, model, "-p", PROMPT, "-n", 12, "--ignore-eos", "--throttle", throttle(model, 0.5)
    )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    answer = expected(model, tuple(tokenizer.encode(PROMPT).ids), 12)
    assert done.stdout == tokenizer.decode(answer) + "\n"
    # The timeline is for people, so it is on the other output; bars and cursors are not.
    assert "first token after" in done.stderr
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("kind", ["-p", "--prompt-ids", "--prompt-file"])
def test_the_document(demo_model: Make, no_leaks: Path, tmp_path: Path, kind: str) -> None:
    model = demo_model("llama")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    prompt: dict[str, tuple[str, list[int]]] = {
        "-p": (PROMPT, tokenizer.encode(PROMPT).ids),
        "--prompt-ids": (",".join(map(str, prompt_of(9))), prompt_of(9)),
        "--prompt-file": (str(tmp_path / "prompt.txt"), tokenizer.encode(PROMPT).ids),
    }
    given, ids = prompt[kind]
    document = run_json(
        no_leaks, model, kind, given, "-n", 10, "--ignore-eos", "--throttle", throttle(model, 0.3)
    )
    assert document["token_ids"] == expected(model, tuple(ids), 10)
    assert document["text"] == tokenizer.decode(document["token_ids"])
    assert document["finish_reason"] == "length"
    assert document["weights_bytes"] == sum(
        tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for file in model.glob("*.safetensors")
        for tensor in header(file).values()
    )
    assert 0.3 * 0.9 < document["load_s"] < document["ttft_s"]
    assert document["load_mode"] == "copied"
    assert document["load_processor_s"] > 0
    assert document["memory_bytes"] > 100 << 20  # two workers with torch, at least
    stages = document["stages"]
    assert {stage["process"] for stage in stages} == {"front", "memory", "prefill-0", "decode-1"}
    assert all(0 <= stage["start_s"] <= stage["end_s"] for stage in stages)
    names = {stage["name"] for stage in stages}
    for name in ("interpreter", "imports", "plan", "weight_read", "stage_ready[0]", "tokenizer"):
        assert name in names
    for name in ("kv_alloc", "prefill[embedding]", "prefill[0]", "prefill[head]", "first_token"):
        assert name in names
    path = document["critical_path"]
    assert path[0]["start_s"] == 0
    assert path[-1]["end_s"] == document["ttft_s"]
    assert 0 <= document["unattributed_s"] < 0.1 * document["ttft_s"]


def header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors: dict[str, Any] = json.loads(data[8 : 8 + size])
    tensors.pop("__metadata__", None)
    return tensors


@pytest.mark.heavy
def test_one_token_has_a_timeline_too(demo_model: Make, no_leaks: Path) -> None:
    # It ends the answer, and the spans of those who made it are behind it.
    for _ in range(3):
        document = run_json(no_leaks, demo_model("llama"), "-p", PROMPT, "-n", 1)
        assert "prefill[head]" in {stage["name"] for stage in document["stages"]}
        assert len(document["token_ids"]) == 1


@pytest.mark.heavy
def test_stops_seeds_and_probabilities(demo_model: Make, no_leaks: Path) -> None:
    sampled = [
        "--prompt-ids", "5,6,7", "-n", 20, "--temperature", 1.5, "--seed", 3, "--ignore-eos",
        "--logprobs", 2,
    ]  # fmt: skip
    model = demo_model("llama")
    first, again = (run_json(no_leaks, model, *sampled) for _ in range(2))
    assert first["token_ids"] == again["token_ids"]
    assert first["logprobs"] == again["logprobs"]
    assert first["token_ids"] != expected(model, (5, 6, 7), 20)
    assert [step["token"] for step in first["logprobs"]] == first["token_ids"]
    for step in first["logprobs"]:
        assert len(step["top"]) == 2
        assert step["top"][0][1] >= step["top"][1][1] <= 0
        assert step["logprob"] <= step["top"][0][1]
    # A text and a token that are known to come, as where the answer ends.
    text = first["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = run_json(no_leaks, model, *sampled, "--stop", "never to be seen", "--stop", stop)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    token = first["token_ids"][5]
    ended = run_json(no_leaks, model, *sampled, "--stop-token-id", token)
    assert ended["token_ids"] == first["token_ids"][: first["token_ids"].index(token) + 1]
    assert ended["finish_reason"] == "stop"


def test_the_timeline_goes_into_a_file(demo_model: Make, no_leaks: Path, tmp_path: Path) -> None:
    file = tmp_path / "start.trace.json"
    model = demo_model("llama")
    done = run(no_leaks, model, "-p", "x", "-n", 2, "--quiet", COLDFRAME_TIMELINE=str(file))
    assert done.stderr == ""
    assert json.loads(file.read_text())["traceEvents"]


# -- a terminal -------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_terminal_shows_the_progress_and_clears_it(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            COLDFRAME, "run", str(model), "-p", PROMPT, "-n", "4", "--quiet",
            "--throttle", throttle(model, 1.5),
        ],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(no_leaks),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        assert select.select([ours], [], [], 30)[0]
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the end of a terminal
            break
    os.close(ours)
    answer, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"\r" not in answer
    frames = shown.decode().split("\r\x1b[2K")
    assert frames[0] == frames[-1] == ""  # what was there is left alone, the bar is taken away
    drawn = frames[1:-1]
    assert len(drawn) > 3
    assert all("B/s" in frame and "left" in frame for frame in drawn)
    # At its ends the bar is of one kind, for as long as workers take to get there.
    assert any("█" + "░" in frame for frame in drawn)


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_signal_in_mid_load_leaves_nothing(
    demo_model: Make, no_leaks: Path, number: int, code: int
) -> None:
    model = demo_model("llama")
    with started(no_leaks, model, "-p", PROMPT, "--throttle", throttle(model, 30)) as process:
        front = psutil.Process(process.pid)
        sockets = partial(no_leaks.glob, "*/memory.sock")
        eventually(lambda: len(front.children()) == 3 and bool(list(sockets())))
        children = front.children(recursive=True)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    eventually(lambda: not list(no_leaks.iterdir()))


@pytest.mark.heavy
def test_a_reader_who_has_seen_enough(demo_model: Make, no_leaks: Path) -> None:
    asked = (demo_model("llama"), "-p", PROMPT, "-n", 400, "--ignore-eos")
    with started(no_leaks, *asked) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=20) == 141


def broken(model: Path, folder: Path) -> Path:
    copy = folder / "broken"
    shutil.copytree(model, copy)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    return copy


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["nowhere", "-p", "x"], "SourceNotFound", "nowhere"),
        (["MODEL", "-p", "x", "-n", "1000000"], "RequestError", "1000000 to generate"),
        (["MODEL", "--prompt-ids", "1,99999"], "RequestError", "99999"),
        (["MODEL", "--prompt-file", "nowhere.txt"], "SourceError", "nowhere.txt"),
        (["MODEL", "-p", "x", "--top-p", "7"], "RequestError", "top_p"),
        (["MODEL", "-p", "x", "--threads", "0"], "RequestError", "--threads"),
        (["MODEL", "-p", "x", "--prefill", "0-2"], "RequestError", "--prefill"),
        (["MODEL", "-p", "x", "--decode", "1@cuda:0"], "DeviceError", "--decode"),
        (["MODEL", "-p", "x", "--scale-down", "0"], "RequestError", "--scale-down"),
        (["BROKEN", "-p", "x"], "CheckpointError", ".safetensors"),
    ],
)
def test_errors(
    demo_model: Make,
    no_leaks: Path,
    tmp_path: Path,
    arguments: list[str],
    kind: str,
    says: str,
) -> None:
    model = demo_model("llama")
    places = {"MODEL": str(model)}
    if "BROKEN" in arguments:
        places["BROKEN"] = str(broken(model, tmp_path))
    done = run(no_leaks, *(places.get(a, a) for a in arguments), "--json", code=1)
    line = done.stderr.removesuffix("\n")
    assert "\n" not in line
    assert line.startswith(f"coldframe: {kind}: ")
    assert says in line
    error = json.loads(done.stdout)
    assert error["error"] == kind
    assert error["what"] in line
    eventually(lambda: not list(no_leaks.iterdir()))


@pytest.mark.heavy
def test_without_an_answer_nothing_is_printed(demo_model: Make, no_leaks: Path) -> None:
    done = run(no_leaks, demo_model("llama"), "--prompt-ids", "99999", code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("coldframe: RequestError: ")


@pytest.mark.heavy
@pytest.mark.parametrize("closed", ["0", "1", "2", "01", "02", "12", "012"])
def test_closed_standard_streams_do_no_harm(demo_model: Make, no_leaks: Path, closed: str) -> None:
    redirects = " ".join(f"{fd}>&-" for fd in closed)
    script = f'exec "$0" run "$1" -p x -n 2 --quiet {redirects}'
    done = subprocess.run(
        ["sh", "-c", script, str(COLDFRAME), str(demo_model("llama"))],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) is ("1" not in closed)


@pytest.mark.heavy
@pytest.mark.parametrize("arguments", [["--help"], ["plan", "MODEL"], ["run", "MODEL", "-p", "x"]])
def test_a_full_disk_behind_standard_output(
    demo_model: Make, no_leaks: Path, arguments: list[str]
) -> None:
    command = [str(demo_model("llama")) if word == "MODEL" else word for word in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [COLDFRAME, *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "written" in done.stderr or "write" in done.stderr
