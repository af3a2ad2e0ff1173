"""A batch's lines and answers as files: read in bounded memory, written whole, found again."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.errors import RequestError, SourceError, SourceNotFound
from coldframe.runtime.batch.input import LineReader, open_input, parse_line
from coldframe.runtime.batch.intake import Intake, Tally
from coldframe.runtime.batch.output import Answers, name_key
from coldframe.runtime.gateway.api import ApiError

LIMIT = 1000


@contextmanager
def answers_in(path: Path, source: str = os.devnull) -> Iterator[Answers]:
    with Answers(str(path), os.stat(source)) as answers:
        yield answers


def read_all(reader: LineReader) -> list[bytes | ApiError]:
    found = []
    while not reader.ended:
        line = reader.next()
        if line is not None:
            found.append(line)
        elif reader.blocked:
            reader.wait()
    return found


def lines_of(path: Path, limit: int = LIMIT) -> list[bytes | ApiError]:
    with closing(LineReader(open_input(str(path)), str(path), limit)) as reader:
        return read_all(reader)


def request(custom_id: object, **more: object) -> dict[str, Any]:
    body = {"prompt": "x", "max_tokens": 2}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return {**line, **more}


def written(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


# -- lines ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b" ")), max_size=8),
    st.booleans(),
    st.integers(1, 30),
)
def test_lines_come_as_python_splits_them(lines: list[bytes], ended: bool, cut: int) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    expected = [*data.split(b"\n")]
    if expected[-1] == b"":
        expected.pop()
    reading, writing = os.pipe()
    with closing(LineReader(reading, "a pipe", 20)) as reader:
        found: list[bytes | ApiError] = []
        for start in range(0, len(data), cut):
            os.write(writing, data[start : start + cut])
            while (line := reader.next()) is not None:
                found.append(line)
            assert reader.blocked
            assert not reader.ended
        os.close(writing)
        found += read_all(reader)
    assert len(found) == len(expected) == reader.number
    for line, wanted in zip(found, expected, strict=True):
        if len(wanted) > 20:
            assert isinstance(line, ApiError)
            assert line.status == 413
        elif wanted.startswith(b"\xef\xbb\xbf"):
            assert line in (wanted, wanted[3:])
        else:
            assert line == wanted


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}\n")
    assert lines_of(tmp_path / "in") == [b"{}", b"\xef\xbb\xbf{}"]


@pytest.mark.heavy
def test_a_long_line_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    # Holes of a sparse file: two lines of a gigabyte, with short ones around them.
    with (tmp_path / "in").open("wb") as file:
        for text in (b"first\n", b"\nsecond\n", b"\nthird"):
            file.write(text)
            if text != b"\nthird":
                file.seek(1 << 30, os.SEEK_CUR)
    code = (
        "import os, resource, sys\n"
        "from coldframe.runtime.batch.input import LineReader, open_input\n"
        "reader = LineReader(open_input(sys.argv[1]), 'in', 1000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "while not reader.ended: print(repr(reader.next())[:9])\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8192\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["b'first'", "ApiError(", "b'second'", "ApiError(", "b'third'"]


def test_a_pipe_that_has_nothing_yet_is_not_waited_for() -> None:
    reading, writing = os.pipe()
    with closing(LineReader(reading, "a pipe", LIMIT)) as reader:
        assert reader.next() is None
        assert (reader.blocked, reader.ended) == (True, False)
        os.write(writing, b"half")
        assert reader.next() is None
        threading.Timer(0.05, os.write, (writing, b" a line\n")).start()
        reader.wait()
        assert reader.next() == b"half a line"
        os.close(writing)
        assert reader.next() is None
        assert (reader.blocked, reader.ended) == (False, True)


def test_an_input_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="nowhere"):
        open_input(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="directory"):
        open_input(str(tmp_path))
    with pytest.raises(SourceError, match="null"):
        open_input("a\0b")


@pytest.mark.parametrize(
    ("line", "name", "says"),
    [
        (b"hello", None, "not JSON"),
        (b'{"custom_id": "a"', None, "not JSON"),
        (b"[1]", None, "not a JSON object"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b'{"custom_id": "a", "custom_id": "b"}', None, "twice"),
        (b'{"custom_id": "\\ud800", "url": "/v1/completions"}', None, "not JSON"),
        (b"{}", None, "custom_id"),
        (b'{"custom_id": 7}', None, "custom_id"),
        (b'{"custom_id": ""}', None, "custom_id"),
        (b'{"custom_id": "' + b"a" * 513 + b'"}', None, "1 to 512"),
        (json.dumps(request("a", method="GET")).encode(), "a", "POST"),
        (json.dumps(request("a", url="/v1/embeddings")).encode(), "a", "/v1/embeddings"),
        (json.dumps(request("a", url=None)).encode(), "a", "/v1/chat/completions"),
        (json.dumps(request("a", url=["x"])).encode(), "a", "no route"),
        (json.dumps(request("a", body=[])).encode(), "a", "body"),
        (json.dumps(request("a", body={"stream": True})).encode(), "a", "stream"),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes, name: str | None, says: str) -> None:
    parsed = parse_line(3, line)
    assert parsed.error is not None
    assert (parsed.number, parsed.custom_id) == (3, name)
    assert parsed.error.status == 400
    assert says in parsed.error.message
    assert len(parsed.error.message) < 400


def test_a_line_that_is_right() -> None:
    parsed = parse_line(7, json.dumps(request("grün")).encode())
    assert (parsed.number, parsed.custom_id, parsed.url) == (7, "grün", "/v1/completions")
    assert parsed.body == {"prompt": "x", "max_tokens": 2}
    assert parsed.error is None


# -- answers ----------------------------------------------------------------------------------


def test_answers_are_lines_as_openai_writes_them(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with answers_in(out) as answers:
        answers.add("a", 1, 200, {"id": "cmpl-1", "text": "zwei\nZeilen\u2028und \ud800"})
        answers.add(None, 2, 400, ApiError(400, "no").to_openai())
    first, second = written(out)
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert re.fullmatch("batch_req_[0-9a-f]{24}", first["id"])
    assert first["custom_id"] == "a"
    assert first["response"]["status_code"] == 200
    assert first["response"]["request_id"]
    assert first["response"]["body"]["text"] == "zwei\nZeilen\u2028und \ud800"
    assert first["error"] is None
    assert second["custom_id"] is None
    assert second["response"]["status_code"] == 400
    assert second["response"]["body"]["error"] == {
        "message": "no", "type": "invalid_request_error", "param": None, "code": None, "line": 2,
    }  # fmt: skip
    assert first["id"] != second["id"]


NAMES = ["a", "grün", 'with "quotes" and \\', "with\nlines", "\u2028", "null", "x" * 512, "𝄞" * 512]


def test_what_is_answered_is_found_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with answers_in(out) as answers:
        for number, name in enumerate(NAMES):
            answers.add(name, number, 200, {"text": "y" * 200_000})
            answers.add(None, 100 + number, 400, ApiError(400, "z" * 500).to_openai())
    before = out.read_bytes()
    with answers_in(out) as answers:
        assert answers.names == {name_key(name) for name in NAMES}
        assert answers.numbers == {100 + number for number in range(len(NAMES))}
    assert out.read_bytes() == before
    # So too where other tools have written it anew.
    compact = (json.dumps(answer, separators=(",", ":")) for answer in written(out))
    out.write_text("\n".join(compact) + "\n")
    with answers_in(out) as answers:
        assert answers.names == {name_key(name) for name in NAMES}
        assert len(answers.numbers) == len(NAMES)


def test_a_torn_end_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with answers_in(out) as answers:
        answers.add("a", 1, 200, {"text": "ä"})
        whole = out.stat().st_size
        answers.add("b", 2, 200, {"text": "ö"})
    data = out.read_bytes()
    for size in range(len(data)):
        out.write_bytes(data[:size])
        with answers_in(out) as answers:
            kept = whole if size >= whole else 0
            assert answers.names == ({name_key("a")} if kept else set())
            assert out.stat().st_size == kept
            answers.add("c", 3, 200, {})
        assert [answer["custom_id"] for answer in written(out)] == ["a", "c"][not kept :]


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"hello",
        b"{}\n",
        b'{"custom_id": "a"}\n',
        b'{"id": "batch_req_1", "custom_id": null, "response": {"body": {}}}\n',
        b'{"id": "batch_req_1", "custom_id": 7, "response": {}}\n',
        b"\0" * 100,
        b"\n",
        b'{"weights": "precious"}',
    ],
)
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(RequestError, match="no answer of a batch"), answers_in(out):
        pass
    assert out.read_bytes() == content


def test_a_damaged_line_is_named_by_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with answers_in(out) as answers:
        answers.add("a", 1, 200, {})
    size = out.stat().st_size
    with out.open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(RequestError, match=f"byte {size}"), answers_in(out):
        pass
    assert out.stat().st_size == size + 4


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with answers_in(out) as answers:
        answers.add("a", 1, 200, {})
        with pytest.raises(RequestError, match="another batch writes"), answers_in(out):
            pass
        answers.add("b", 2, 200, {})
    with answers_in(out) as answers:
        assert len(answers.names) == 2


def test_what_answers_cannot_go_to(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("in")
    for path, says in [
        (tmp_path, "directory"),
        (tmp_path / "fifo", "regular file"),
        (Path(os.devnull), "regular file"),
        (tmp_path / "nowhere" / "out", "No such file"),
        (tmp_path / "in", "same file"),
        (tmp_path / "link", "same file"),
        (Path("a\0b"), "null"),
    ]:
        with pytest.raises(RequestError, match=says), answers_in(path, str(tmp_path / "in")):
            pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    # As a full disk does, this lets a part of a line through before it refuses the rest.
    out = tmp_path / "out.jsonl"
    code = (
        "import os, resource, signal, sys\n"
        "from coldframe.loader.errors import PlatformError\n"
        "from coldframe.runtime.batch.output import Answers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "answers = Answers(sys.argv[1], os.stat('/dev/null'))\n"
        "answers.add('a', 1, 200, {'text': 'x' * 1000})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: answers.add('b', 2, 200, {'text': 'x' * 1000})\n"
        "except PlatformError as error: print(error)\n"
        "answers.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert os.strerror(errno.EFBIG) in done.stdout
    assert "goes on there" in done.stdout
    assert [answer["custom_id"] for answer in written(out)] == ["a"]


# -- what is left to do -----------------------------------------------------------------------


def asked(source: Path, out: Path, stop_after: int | None = None) -> tuple[list[str], Tally]:
    """Answers lines, up to so many: who was asked, and the counts."""
    tally, names = Tally(), []
    with (
        closing(LineReader(open_input(str(source)), str(source), LIMIT)) as reader,
        Answers(str(out), os.fstat(reader.fd)) as answers,
    ):
        intake = Intake(reader, answers, tally)
        if not intake.any():
            return [], tally
        assert intake.first is not None
        while not intake.ended and len(names) != stop_after:
            line = intake.next()
            if line is not None:
                assert line.custom_id is not None
                names.append(line.custom_id)
                tally.answered += 1
                answers.add(line.custom_id, line.number, 200, {})
    return names, tally


def test_every_line_has_one_answer_and_wrong_ones_harm_no_other(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        json.dumps(request("a")),
        "nonsense",
        "",
        json.dumps(request("b", url="/v2")),
        json.dumps(request("a")),
        "   ",
        json.dumps(request("b")),
        "x" * 2000,
        json.dumps(request(None)),
        json.dumps(request("c")),
    ]
    source.write_text("\n".join(lines))
    names, tally = asked(source, out)
    assert names == ["a", "c"]
    assert (tally.lines, tally.answered, tally.refused, tally.skipped) == (8, 2, 6, 0)
    told = {
        answer["custom_id"] or answer["response"]["body"]["error"]["line"]: (
            answer["response"]["status_code"],
            answer["response"]["body"].get("error", {}).get("code"),
        )
        for answer in written(out)
    }
    assert told == {
        "a": (200, None),
        2: (400, "invalid_json"),
        "b": (400, "invalid_value"),
        5: (400, "duplicate_custom_id"),
        7: (400, "duplicate_custom_id"),
        8: (413, "line_too_long"),
        9: (400, "invalid_value"),
        "c": (200, None),
    }
    before = out.read_bytes()
    names, tally = asked(source, out)
    assert names == []
    assert (tally.lines, tally.skipped, tally.unanswered) == (8, 8, 0)
    assert out.read_bytes() == before


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_however_often_it_is_killed_each_line_is_answered_once(
    tmp_path_factory: pytest.TempPathFactory, chance: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("batch")
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    kinds = [chance.choice("nnnd!") for _ in range(20)]
    texts = []
    for number, kind in enumerate(kinds):
        name = f"id-{number}" if kind == "n" else f"id-{chance.randrange(20)}"
        texts.append("{" if kind == "!" else json.dumps(request(name)))
    source.write_text("\n".join(texts) + "\n")
    while True:
        # Killed after a few lines, with the last of what was written torn.
        _, tally = asked(source, out, stop_after=chance.randrange(1, 5))
        if tally.skipped == tally.lines:
            break
        if chance.random() < 0.5:
            os.truncate(out, max(0, out.stat().st_size - chance.randrange(200)))
    answers = written(out)
    names = [answer["custom_id"] for answer in answers if answer["custom_id"]]
    wrong = [a["response"]["body"]["error"]["line"] for a in answers if not a["custom_id"]]
    wanted = {json.loads(text)["custom_id"] for text in texts if text != "{"}
    assert sorted(names) == sorted(wanted)
    assert len(set(wrong)) == len(wrong)
    assert len(answers) == len(texts)


def test_lines_that_are_added_later_are_answered_later(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(request("a")) + "\n")
    assert asked(source, out)[0] == ["a"]
    with source.open("a") as file:
        file.write(json.dumps(request("b")) + "\n")
    assert asked(source, out)[0] == ["b"]


def test_an_empty_input_has_nothing_to_answer(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n")
    names, tally = asked(source, out)
    assert (names, tally.lines) == ([], 0)
    assert out.read_bytes() == b""
