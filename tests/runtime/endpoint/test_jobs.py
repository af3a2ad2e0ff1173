"""The process that fetches jobs: it has neither rights nor secrets that are not its own."""

from __future__ import annotations

import psutil
import pytest

from coldframe.runtime.endpoint.jobs import JobFetcher
from coldframe.snapshot.identity import service_identity
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.heavy

KEY = "sk-of-the-gateway-0123456789"


def status_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        parts = [line.partition(":") for line in file]
    return {name: value.strip() for name, _, value in parts}


def test_it_has_neither_rights_nor_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody is there: it tries again and again, as it does while a queue is away.
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:1/job-take/$ID")
    monkeypatch.setenv("RUNPOD_AI_API_KEY", "its own")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not its own")
    before = psutil.Process().children()
    fetcher = JobFetcher(1, KEY, service_identity(None))
    try:
        (child,) = set(psutil.Process().children()) - set(before)

        def confined() -> bool:
            return status_of(child.pid).get("NoNewPrivs") == "1"

        eventually(confined)
        eventually(lambda: int(status_of(child.pid)["CapEff"], 16) == 0)
        told = status_of(child.pid)
        assert {int(told[name], 16) for name in ("CapPrm", "CapInh", "CapBnd", "CapAmb")} == {0}
        environ = child.environ()
        assert environ["RUNPOD_AI_API_KEY"] == "its own"
        assert "AWS_SECRET_ACCESS_KEY" not in environ
        assert KEY not in str([environ, child.cmdline()])
        assert fetcher.status is None
    finally:
        fetcher.close()
    assert fetcher.status is not None
