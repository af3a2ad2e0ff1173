"""Flags and their twins in the environment."""

from __future__ import annotations

import argparse

import pytest

from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.units import byte_rate


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Parser:
    parser = Parser(prog="coldframe test")
    parser.add_argument("model")
    parser.flag("--rate-limit", type=byte_rate, help="how fast")
    parser.flag("--count", type=int, default=3, help="how many")
    parser.flag("--name", help="a text")
    parser.flag("--kind", choices=["one", "two"], help="which")
    parser.flag("--copy", action="store_true", help="whether")
    parser.flag("--tag", action="append", help="some")
    parser.flag("-n", "--number", type=int, default=1, group=parser.add_argument_group("more"))
    return parser


def parse(parser: Parser, *arguments: str) -> argparse.Namespace:
    return parser.parse(["model", *arguments])


def test_without_any_the_defaults_are_taken(parser: Parser) -> None:
    assert vars(parse(parser)) == {
        "model": "model",
        "rate_limit": None,
        "count": 3,
        "name": None,
        "kind": None,
        "copy": False,
        "tag": None,
        "number": 1,
    }


def test_the_environment_gives_what_the_command_line_does_not(
    parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_RATE_LIMIT", "200MB/s")
    monkeypatch.setenv("COLDFRAME_COUNT", "7")
    monkeypatch.setenv("COLDFRAME_NAME", "7")
    monkeypatch.setenv("COLDFRAME_KIND", "two")
    monkeypatch.setenv("COLDFRAME_TAG", "a")
    monkeypatch.setenv("COLDFRAME_NUMBER", "9")
    args = parse(parser)
    assert args.rate_limit == 200e6
    assert (args.count, args.name, args.kind, args.tag) == (7, "7", "two", ["a"])
    assert args.number == 9


def test_the_flag_wins(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_COUNT", "7")
    monkeypatch.setenv("COLDFRAME_TAG", "a")
    args = parse(parser, "--count", "8", "--tag", "b", "--tag", "c")
    assert args.count == 8
    assert args.tag == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("1", "true", "Yes", "on")),
        *((text, False) for text in ("0", "false", "NO", "", "off")),
    ],
)
def test_switches(parser: Parser, monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("COLDFRAME_COPY", text)
    assert parse(parser).copy is value
    assert parse(parser, "--copy").copy is True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("COLDFRAME_RATE_LIMIT", "fast"),
        ("COLDFRAME_COUNT", "many"),
        ("COLDFRAME_KIND", "three"),
        ("COLDFRAME_COPY", "perhaps"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    parser: Parser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as ended:
        parse(parser)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"environment variable {name}: " in error
    assert repr(text) in error


def test_a_flag_that_is_required_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="coldframe test")
    parser.flag("--out", required=True)
    with pytest.raises(SystemExit):
        parser.parse([])
    assert "--out" in capsys.readouterr().err
    monkeypatch.setenv("COLDFRAME_OUT", "there")
    assert parser.parse([]).out == "there"


def test_help_names_the_twin(parser: Parser) -> None:
    assert "how fast [COLDFRAME_RATE_LIMIT]" in parser.format_help()


def test_abbreviations_are_refused(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(parser, "--cop")
    assert ended.value.code == 2
    assert "--cop" in capsys.readouterr().err


def test_several_of_the_same_may_have_flags_between_them() -> None:
    parser = Parser(prog="coldframe test")
    parser.add_argument("models", nargs="*")
    parser.flag("--port", type=int)
    args = parser.parse(["a", "--port", "1", "b"])
    assert (args.models, args.port) == (["a", "b"], 1)
    assert parser.parse([]).models == []
