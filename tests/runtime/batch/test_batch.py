"""`coldframe batch` as users have it: right answers, each once, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from coldframe.runtime.checkpoints.demo_tokenizer import FIRST_WORD
from tests.runtime.helpers import expected, prompt_of
from tests.support import without_settings

Make = Callable[..., Path]
COLDFRAME = str(Path(sys.executable).parent / "coldframe")
GREEDY = {"temperature": 0, "ignore_eos": True}


def environment(runs: Path) -> dict[str, str]:
    clean = without_settings()
    return {**clean, "COLDFRAME_RUN_DIR": str(runs), "COLDFRAME_SNAPSHOT": "off"}


class Files:
    """A batch's input and output."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "in.jsonl"
        self.out = folder / "out.jsonl"

    def ask(self, *lines: dict[str, Any] | str) -> None:
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        self.source.write_text("".join(f"{text}\n" for text in texts))

    def answers(self) -> dict[str | None, dict[str, Any]]:
        """The responses by custom_id, each of which is there once; what is torn does not count."""
        lines = self.out.read_bytes().split(b"\n")[:-1] if self.out.exists() else []
        found = [json.loads(line) for line in lines]
        names = [answer["custom_id"] for answer in found]
        assert len(set(names)) == len(names)
        return {answer["custom_id"]: answer["response"] for answer in found}

    def texts(self) -> dict[str | None, str]:
        """The texts of completions, all of which were answered."""
        answers = self.answers()
        assert all(response["status_code"] == 200 for response in answers.values()), answers
        return {name: r["body"]["choices"][0]["text"] for name, r in answers.items()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@contextmanager
def started(
    runs: Path, model: Path, files: Files, *more: object, **popen: Any
) -> Iterator[subprocess.Popen[str]]:
    """The command, going on; it is killed if it still runs in the end."""
    command = [COLDFRAME, "batch", model, files.source, files.out, *more]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    with subprocess.Popen(
        [str(word) for word in command], text=True, env=environment(runs), **streams
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def batch(
    runs: Path, model: Path, files: Files, *more: object, code: int = 0
) -> tuple[dict[str, Any], str]:
    """Runs the command to its end: its document, and standard error."""
    with started(runs, model, files, *more, "--json") as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document, err


def completion(name: str, prompt: Sequence[int] | str, count: int, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": count, **GREEDY, **more}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def chat(name: str, text: str, count: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": count, **GREEDY, **more}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def many(count: int, tokens: int) -> tuple[list[dict[str, Any]], dict[str, tuple[int, ...]]]:
    """Lines of different lengths, and their prompts."""
    # They end with a word: what ends in the middle of a character has its rest in the answer.
    prompts = {
        f"line-{i}": (*prompt_of(2 + 7 * (i % 11), seed=i), FIRST_WORD + i) for i in range(count)
    }
    asked = [completion(name, list(ids), tokens + len(ids) % 5) for name, ids in prompts.items()]
    return asked, prompts


def check(
    files: Files, model: Path, prompts: dict[str, tuple[int, ...]], tokens: int, every: int = 1
) -> None:
    """All lines have their answers; of every so many, the answer is that of Transformers."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = files.texts()
    assert texts.keys() == prompts.keys()
    for name, ids in list(prompts.items())[::every]:
        wanted = expected(model, ids, tokens + len(ids) % 5)
        assert texts[name] == tokenizer.decode(wanted), name


def throttle(model: Path, seconds: float) -> str:
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return f"{size / seconds:.0f}B/s"


def eventually(done: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def workers(front: int) -> list[psutil.Process]:
    """The children of a front that are workers: the memory service is the first of them."""
    return sorted(psutil.Process(front).children(), key=lambda child: child.pid)[1:]


# -- answers ----------------------------------------------------------------------------------


def test_answers_are_those_of_transformers(demo_model: Make, no_leaks: Path, files: Files) -> None:
    from transformers import AutoTokenizer

    model = demo_model("llama")
    theirs = AutoTokenizer.from_pretrained(model)
    text = "Once upon a time, a replica slept at zero"
    prompts = {f"ids-{n}": tuple(prompt_of(n, seed=n)) for n in (1, 7, 64)}
    prompts["text"] = tuple(theirs.encode(text))
    turns = [{"role": "user", "content": text}]
    prompts["chat"] = tuple(
        theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    )
    several = [list(prompts["ids-7"]), list(prompts["ids-64"])]
    files.ask(
        *(completion(name, list(prompts[name]), 9) for name in prompts if "ids" in name),
        "this is no request",
        completion("text", text, 9, model=model.name),
        chat("chat", text, 9, logprobs=True, top_logprobs=2),
        chat("other", text, 9, model="gpt-4"),
        completion("two", several, 9, n=2),
        completion("wrong", text, 9, top_p=7),
        completion("long", text, 9000),
        completion("tools", text, 9, stream=True),
    )
    document, err = batch(no_leaks, model, files)
    assert err == ""
    answers = files.answers()
    decode = Tokenizer.from_file(str(model / "tokenizer.json")).decode
    wanted = {name: decode(expected(model, ids, 9)) for name, ids in prompts.items()}
    for name, ids in prompts.items():
        assert answers[name]["status_code"] == 200
        body = answers[name]["body"]
        assert body["model"] == model.name
        cached = body["usage"].pop("prompt_tokens_details")["cached_tokens"]
        assert 0 <= cached < len(ids)
        assert body["usage"] == {
            "prompt_tokens": len(ids), "completion_tokens": 9, "total_tokens": len(ids) + 9,
        }  # fmt: skip
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "length"
        got = choice["message"]["content"] if name == "chat" else choice["text"]
        assert got == wanted[name]
    assert len(answers["chat"]["body"]["choices"][0]["logprobs"]["content"]) == 9
    two = [choice["text"] for choice in answers["two"]["body"]["choices"]]
    assert two == [wanted["ids-7"]] * 2 + [wanted["ids-64"]] * 2
    statuses = {name: response["status_code"] for name, response in answers.items()}
    refused = {None: 400, "other": 404, "wrong": 400, "long": 400, "tools": 400}
    assert statuses == {**dict.fromkeys([*prompts, "two"], 200), **refused}
    for name in refused:
        assert answers[name]["body"]["error"]["message"]
    assert answers[None]["body"]["error"]["line"] == 4
    assert answers["wrong"]["body"]["error"]["param"] == "top_p"
    assert (document["lines"], document["answered"], document["refused"]) == (11, 6, 5)
    assert document["completion_tokens"] == 5 * 9 + 4 * 9
    assert document["unanswered"] == document["skipped"] == 0
    assert document["interrupted"] is None
    assert document["tier"] == "fresh"
    assert 0 < document["ttft_s"] < document["seconds"]
    assert document["tokens_per_second"] > 0
    assert "prefill[head]" in {stage["name"] for stage in document["stages"]}
    assert document["critical_path"][-1]["end_s"] == document["ttft_s"]

    # All is answered: now nothing is loaded, not even looked for.
    before = files.out.read_bytes()
    document, _ = batch(no_leaks, Path("nowhere"), files)
    assert (document["loaded"], document["skipped"], document["lines"]) == (False, 11, 11)
    assert document["ttft_s"] is None
    assert files.out.read_bytes() == before
    assert list(no_leaks.iterdir()) == []


@pytest.mark.heavy
def test_nothing_is_loaded_for_files_that_will_not_do(
    demo_model: Make, no_leaks: Path, files: Files, tmp_path: Path
) -> None:
    files.ask(completion("a", "x", 1))
    same, foreign, folder = Files(tmp_path), Files(tmp_path), Files(tmp_path)
    same.out = same.source
    foreign.out = tmp_path / "precious"
    foreign.out.write_text("precious\n")
    folder.out = tmp_path
    nowhere = Files(tmp_path / "nowhere")
    for wrong, kind in [
        (same, "RequestError"),
        (foreign, "RequestError"),
        (folder, "RequestError"),
        (nowhere, "SourceNotFound"),
    ]:
        error, err = batch(no_leaks, Path("no-such-model"), wrong, code=1)
        assert error["error"] == kind, err
        assert err.startswith(f"coldframe: {kind}: ")
    assert foreign.out.read_text() == "precious\n"
    for flags in (["--concurrency", 0], ["--drain", "-1"], ["--drain", "nan"]):
        error, _ = batch(no_leaks, Path("no-such-model"), files, *flags, code=1)
        assert error["where"] == flags[0]
    eventually(lambda: list(no_leaks.iterdir()) == [])


@pytest.mark.heavy
def test_people_get_a_summary(demo_model: Make, no_leaks: Path, files: Files) -> None:
    model = demo_model("llama")
    files.ask(*many(5, 4)[0], "wrong")
    with started(no_leaks, model, files) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    assert "5 of 6 lines answered" in err
    assert "1 refused" in err
    assert "first token after" in err
    assert "\r" not in err
    with started(no_leaks, model, files, "--quiet") as process:
        assert process.communicate(timeout=60) == ("", "")


@pytest.mark.heavy
def test_a_terminal_shows_how_it_goes(demo_model: Make, no_leaks: Path, files: Files) -> None:
    model = demo_model("llama")
    files.ask(*many(40, 60)[0])
    ours, theirs = pty.openpty()
    slow = ("--throttle", throttle(model, 1.0), "--concurrency", 4)
    with started(no_leaks, model, files, *slow, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            assert select.select([ours], [], [], 60)[0]
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the end of a terminal
                break
        os.close(ours)
        assert process.wait(timeout=30) == 0
    frames = shown.decode().split("\r\x1b[2K")
    assert any("B/s" in frame and "█" in frame for frame in frames)
    assert any("running" in frame and "tokens/s" in frame for frame in frames)
    assert frames[-1].startswith("40 of 40 lines answered")


@pytest.mark.heavy
def test_lines_from_a_pipe_are_answered_as_they_come(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    # Each line is only written when the one before has its answer.
    model = demo_model("llama")
    lines, prompts = many(6, 5)
    files.source = Path("-")
    with started(no_leaks, model, files, "--json", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        for number, line in enumerate(lines):
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            eventually(lambda n=number: len(files.answers()) == n + 1)  # type: ignore[misc]
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["answered"] == 6
    check(files, model, prompts, 5)


@pytest.mark.heavy
def test_a_template_that_loops_costs_only_its_line(
    demo_model: Make, no_leaks: Path, files: Files, tmp_path: Path
) -> None:
    model = demo_model("llama")
    (tmp_path / "template.jinja").write_text(
        "{% if messages[0]['content'] == 'loop' %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ messages[0]['content'] }}"
    )
    files.ask(chat("a", "Hello", 4), chat("loop", "loop", 4), chat("b", "Hello", 4))
    batch(no_leaks, model, files, "--chat-template", tmp_path / "template.jinja")
    statuses = {name: response["status_code"] for name, response in files.answers().items()}
    assert statuses == {"a": 200, "loop": 400, "b": 200}


# -- deaths -----------------------------------------------------------------------------------


@pytest.mark.heavy
def test_workers_that_are_killed_cost_no_answer(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    model = demo_model("llama")
    lines, prompts = many(80, 40)
    files.ask(*lines)
    # Prefill, decode, and prefill again: below the number of deaths that ends a replica.
    with started(no_leaks, model, files, "--json", "--concurrency", 8) as process:
        for answered, victim in ((5, 0), (20, 1), (40, 0), (55, 1)):
            eventually(lambda n=answered: len(files.answers()) >= n)  # type: ignore[misc]
            known = workers(process.pid)
            assert len(known) == 2
            known[victim].kill()
            eventually(lambda dead=known[victim]: not dead.is_running())  # type: ignore[misc]
            eventually(lambda: len(workers(process.pid)) == 2)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert json.loads(out)["answered"] == 80
    check(files, model, prompts, 40, every=5)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_it_goes_on_where_it_was(
    demo_model: Make, no_leaks: Path, files: Files, seed: int
) -> None:
    model = demo_model("llama")
    lines, prompts = many(300, 30)
    files.ask(*lines)
    chance = random.Random(seed)
    for _ in range(6):
        before = len(files.answers())
        with started(no_leaks, model, files, "--concurrency", 6) as process:
            if chance.random() < 0.7:
                aim = before + chance.randrange(8)
                eventually(lambda n=aim: len(files.answers()) >= n)  # type: ignore[misc]
            time.sleep(chance.random() * 0.3)
            front = psutil.Process(process.pid)
            family = front.children(recursive=True)
            for member in [front, *family]:
                member.kill()
            process.communicate(timeout=30)
        psutil.wait_procs(family, timeout=10)
        assert len(files.answers()) >= before
    answered = len(files.answers())
    assert 0 < answered < 300
    document, _ = batch(no_leaks, model, files)
    assert (document["skipped"], document["answered"]) == (answered, 300 - answered)
    check(files, model, prompts, 30, every=20)


@pytest.mark.heavy
def test_when_the_replica_fails_answers_stay_and_the_rest_come_later(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    model = demo_model("llama")
    lines, prompts = many(40, 40)
    files.ask(*lines)
    with started(no_leaks, model, files, "--json", "--concurrency", 4) as process:
        eventually(lambda: len(files.answers()) >= 5)
        psutil.Process(process.pid).children()[0].kill()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the memory service died" in err
    assert json.loads(out)["error"] == "ReplicaError"
    answered = len(files.answers())
    assert 5 <= answered < 40
    document, _ = batch(no_leaks, model, files)
    assert (document["skipped"], document["answered"]) == (answered, 40 - answered)
    check(files, model, prompts, 40, every=5)


@pytest.mark.heavy
def test_a_full_disk_ends_it_and_room_lets_it_go_on(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    model = demo_model("llama")
    lines, prompts = many(40, 40)
    files.ask(*lines)
    with started(no_leaks, model, files, "--json", "--concurrency", 4) as process:
        eventually(lambda: len(files.answers()) >= 3)
        room = files.out.stat().st_size + 2000
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert json.loads(out)["error"] == "PlatformError"
    assert files.out.read_bytes().endswith(b"\n")
    assert 3 <= len(files.answers()) < 40
    batch(no_leaks, model, files)
    check(files, model, prompts, 40, every=5)


@pytest.mark.heavy
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_what_runs_be_finished(
    demo_model: Make, no_leaks: Path, files: Files, number: int, code: int
) -> None:
    model = demo_model("llama")
    lines, prompts = many(60, 40)
    files.ask(*lines)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with started(no_leaks, model, files, "--json", "--concurrency", 4) as process:
            eventually(lambda: len(files.answers()) >= 5)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (process.returncode, err) == (code, "")
    assert psutil.wait_procs(children, timeout=10)[1] == []
    document = json.loads(out)
    assert document["interrupted"] == signal.Signals(number).name
    # All that was begun has its answer, and nothing else was begun.
    assert document["answered"] == len(files.answers()) < 60
    assert document["unanswered"] == 0
    batch(no_leaks, model, files)
    check(files, model, prompts, 40, every=5)


@pytest.mark.heavy
def test_neither_a_short_patience_nor_a_second_signal_waits(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    model = demo_model("llama")
    long = [completion(f"long-{i}", prompt_of(5, seed=i), 900) for i in range(31)]
    files.ask(*many(1, 3)[0], *long)
    for drain, signals in ((0.2, 1), (1000, 2)):
        files.out.unlink(missing_ok=True)
        with started(no_leaks, model, files, "--json", "--drain", drain) as process:
            eventually(lambda: len(files.answers()) == 1)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (143, "")
        if signals == 1:
            assert json.loads(out)["unanswered"] == 31
        assert files.answers().keys() == {"line-0"}
    eventually(lambda: list(no_leaks.iterdir()) == [])


@pytest.mark.heavy
def test_a_signal_while_the_model_loads_ends_it_at_once(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    model = demo_model("llama")
    files.ask(*many(3, 3)[0])
    slow = ("--throttle", throttle(model, 1000), "--drain", 1000)
    with started(no_leaks, model, files, "--json", *slow) as process:
        eventually(lambda: len(workers(process.pid)) == 2)
        eventually(lambda: bool(list(no_leaks.glob("*/memory.sock"))))
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 143
    assert files.answers() == {}
    eventually(lambda: list(no_leaks.iterdir()) == [])


@pytest.mark.heavy
def test_two_batches_do_not_write_to_one_file(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    model = demo_model("llama")
    lines, prompts = many(30, 30)
    files.ask(*lines)
    with started(no_leaks, model, files, "--concurrency", 4) as process:
        eventually(lambda: len(files.answers()) >= 1)
        error, _ = batch(no_leaks, model, files, code=1)
        assert "another batch" in error["what"]
        process.communicate(timeout=60)
    assert process.returncode == 0
    check(files, model, prompts, 30, every=5)


@pytest.mark.heavy
def test_a_broken_model_is_said_once_and_no_line_is_answered(
    demo_model: Make, no_leaks: Path, files: Files, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo_model("llama"), broken)
    shard = sorted(broken.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 100)
    files.ask(*many(5, 3)[0])
    error, _ = batch(no_leaks, broken, files, code=1)
    assert error["error"] == "CheckpointError"
    assert files.answers() == {}


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_input(
    demo_model: Make, no_leaks: Path, files: Files
) -> None:
    # 200 MB of lines, of which all but the last few are refused as soon as they are read.
    model = demo_model("llama")
    with files.source.open("w") as file:
        file.write(json.dumps(completion("first", "x", 2)) + "\n")
        for number in range(200):
            file.write(json.dumps(completion(f"big-{number}", "x" * 1_000_000, 2, top_p=7)) + "\n")
        file.write(json.dumps(completion("last", "x", 2)) + "\n")
    peak = 0
    with started(no_leaks, model, files, "--json") as process:
        front = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, front.memory_info().rss if front.is_running() else 0)
            time.sleep(0.02)
        out, _ = process.communicate(timeout=60)
    assert json.loads(out)["refused"] == 200
    assert {name for name, r in files.answers().items() if r["status_code"] == 200} == {
        "first",
        "last",
    }
    assert peak < 150 << 20
