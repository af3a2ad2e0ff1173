"""Peers found by Dynamo's real discovery: a folder, the request plane TCP, all on loopback."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import wait_for
from tests.runtime.snapshots import eventually
from tests.support import without_settings

pytestmark = pytest.mark.dynamo

MODULE = "coldframe.runtime.integrations.dynamo.peers"


class Cluster:
    """Where nodes find each other.

    Args:
        base: A folder for all that is kept.
    """

    def __init__(self, base: Path) -> None:
        self._environment = {
            **without_settings(),
            "DYN_FILE_KV": str(base / "kv"),
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_REQUEST_PLANE": "tcp",
        }

    @contextmanager
    def member(self, model: object, listed: Path, *flags: str) -> Iterator[None]:
        """A process that keeps a list of the nodes, while the context lasts; it ends well."""
        command = [sys.executable, "-m", MODULE, str(model), "--list", str(listed), *flags]
        with open(f"{listed}.log", "wb") as log:
            process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
            try:
                yield
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0, Path(f"{listed}.log").read_text()
            finally:
                process.kill()
                process.wait()


def lines(path: Path) -> list[str] | None:
    return path.read_text().split() if path.exists() else None


def test_nodes_of_a_model_are_listed_while_they_are_there(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    with (
        cluster.member("s3://b/m", first, "--serves", "127.0.0.1:9401"),
        cluster.member("s3://b/n", other),
    ):
        with cluster.member("s3://b/m", second, "--serves", "127.0.0.1:9402"):
            both = ["127.0.0.1:9401", "127.0.0.1:9402"]
            eventually(lambda: lines(first) == both and lines(second) == both, seconds=60)
        eventually(lambda: lines(first) == both[:1], seconds=60)
        eventually(lambda: lines(other) == [], seconds=60)


def test_an_address_for_others_is_none_for_all(tmp_path: Path) -> None:
    command = [sys.executable, "-m", MODULE, "m", "--list", str(tmp_path / "list")]
    done = subprocess.run(
        [*command, "--serves", "0.0.0.0:9400"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "others must be told an address" in done.stderr


def test_a_new_replica_is_fed_by_who_is_in_the_discovery(
    demo_model: Callable[..., Path], tmp_path: Path, no_leaks: Path
) -> None:
    model, cluster = demo_model(), Cluster(tmp_path)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    def replica(**more: object) -> Replica:
        wanted = {"run_dir": str(no_leaks), "serve_peers": "127.0.0.1:0", **more}
        return Replica(ReplicaOptions(str(model), prefill=0, decode=0, **wanted))  # type: ignore[arg-type]

    with ExitStack() as stack:
        warm = stack.enter_context(replica())
        wait_for(warm, lambda: warm.loaded)
        at = warm.facts["peers_at"]
        stack.enter_context(cluster.member(model, theirs, "--serves", at))
        stack.enter_context(cluster.member(model, ours))
        eventually(lambda: lines(ours) == [at], seconds=60)
        new = stack.enter_context(replica(peers_from=(f"file://{ours}",)))
        wait_for(new, lambda: new.loaded)
        assert new.facts["why"] == f"from peer://{at}"
