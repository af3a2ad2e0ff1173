"""What the command line seems to say."""

from __future__ import annotations

import pytest

from coldframe.runtime.start.guess import said


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
