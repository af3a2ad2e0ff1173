"""What children get of the front's environment."""

from __future__ import annotations

import pytest

from coldframe.runtime.start.environment import without_secrets

SECRETS = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "COLDFRAME_API_KEYS",
    "COLDFRAME_PEER_TOKEN",
    "HF_TOKEN",
    "RUNPOD_API_KEY",
    "database_password",
]
PLAIN = ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "OMP_NUM_THREADS", "COLDFRAME_THROTTLE"]


@pytest.mark.parametrize("name", SECRETS)
def test_what_opens_doors_stays_behind(name: str) -> None:
    assert without_secrets({name: "x", "PATH": "/bin"}) == {"PATH": "/bin"}


def test_the_rest_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_secrets(dict.fromkeys(PLAIN, "x")) == dict.fromkeys(PLAIN, "x")
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("SOMETHING", "y")
    found = without_secrets()
    assert "HF_TOKEN" not in found
    assert found["SOMETHING"] == "y"
