"""What the command line seems to say."""

from __future__ import annotations

import pytest

from coldframe.runtime.flags.parser import _FALSE, _TRUE, Parser
from coldframe.runtime.start.guess import is_set, said


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], None),
        (["--port", "80"], "80"),
        (["--port=80"], "80"),
        (["--port", "80", "--port", "81"], "81"),
        (["--port"], ""),
        (["--http_port=82"], "82"),
        (["--http_port=82", "--port", "80"], "80"),
        (["--ports", "80"], None),
    ],
)
def test_a_flag(arguments: list[str], found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFRAME_PORT", raising=False)
    assert said(arguments, "--port", "--http_port") == found


def test_its_twin_comes_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_MODEL_NAME", "twin")
    assert said([], "--model-name") == "twin"
    assert said(["--model-name", "flag"], "--model-name") == "flag"


@pytest.mark.parametrize(
    ("arguments", "twin", "found"),
    [
        ([], None, False),
        (["--dynamo"], None, True),
        (["--dynamo"], "0", True),
        (["--dynamos"], None, False),
        ([], "", False),
        ([], "0", False),
        ([], "1", True),
        ([], "True", True),
    ],
)
def test_a_flag_without_a_value(
    arguments: list[str], twin: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLDFRAME_DYNAMO", raising=False)
    if twin is not None:
        monkeypatch.setenv("COLDFRAME_DYNAMO", twin)
    assert is_set(arguments, "--dynamo") is found


@pytest.mark.parametrize("text", sorted(_TRUE | _FALSE))
def test_it_is_what_the_parser_makes_of_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_DYNAMO", text)
    parser = Parser()
    parser.flag("--dynamo", action="store_true")
    assert is_set([], "--dynamo") is parser.parse([]).dynamo
