from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.harness import chosen, fingerprint
from coldframe.loader.errors import RequestError
from coldframe.runtime.cli import main

KNOWN = ["one", "the other", "a third"]


def test_some_of_what_there_is() -> None:
    assert chosen(None, KNOWN) == KNOWN
    assert chosen("a third, one", KNOWN) == ["one", "a third"]
    for text in ("two", "one, two", "", " ,"):
        with pytest.raises(RequestError) as caught:
            chosen(text, KNOWN)
        assert "a third" in str(caught.value)


@pytest.mark.parametrize("name", ["vllm-load", "vllm-gated", "vllm-handoff"])
def test_what_is_not_there_is_refused_before_anything_starts(
    demo_model: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["bench", name, str(demo_model()), "--only", "nothing such"]) == 1
    told = capsys.readouterr()
    assert "nothing such" in told.err
    assert not told.out


def test_the_command_is_told_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ["https://me:word@host/a/b", "https://host/c?X-Signature=abc&d=e", "--runs", "3"]
    monkeypatch.setattr("sys.argv", ["/bin/coldframe", "bench", "cold", *urls])
    told = "coldframe bench cold https://host/a/b 'https://host/c?...' --runs 3"
    assert fingerprint()["command"] == told
