"""Single checks of the doctor's: on files as a kernel would show them, and on real sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import DeviceFull, PlatformError, SourceCredentials
from coldframe.runtime.checks import credentials, kernel, machine, network, storage
from coldframe.runtime.checks.finding import Case
from tests.runtime.snapshots import COLDFRAME
from tests.support import without_settings

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED42",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-0123456789",
    "AWS_SESSION_TOKEN": "planted-session-token-xyz",
    "HF_TOKEN": "hf_plantedplantedplanted",
    "COLDFRAME_PEER_TOKEN": "planted-peer-token-abcdef",
    "COLDFRAME_API_KEYS": "planted-api-key-one-123456,planted-api-key-two-654321",
}


def rooted(tmp_path: Path, **files: str) -> Case:
    """A machine with those files; `__` stands for a slash."""
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Case(root=tmp_path)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_no_secret_is_said(more: list[str], tmp_path: Path) -> None:
    env = {**without_settings(), **SECRETS, "XDG_CACHE_HOME": str(tmp_path)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "AWS_EC2_METADATA_DISABLED": "true"}
    call = [COLDFRAME, "doctor", *more]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    for value in ",".join(SECRETS.values()).split(","):
        # Nor a part that would help anybody.
        for start in range(0, len(value) - 8, 4):
            assert value[start : start + 8] not in done.stdout + done.stderr
    if more:
        facts = {check["name"]: check["facts"] for check in json.loads(done.stdout)["checks"]}
        assert facts["s3_credentials"]["kind"] == "env"
        assert facts["hub_token"]["from"] == "HF_TOKEN"
        assert facts["peer_token"]["there"]
        assert facts["api_keys"]["count"] == 2


def test_a_file_of_keys_that_cannot_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_API_KEYS_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(PlatformError):
        credentials.api_keys(Case())


def test_a_bucket_wants_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert credentials.s3(Case()).status == "ok"
    found = credentials.s3(Case(model="s3://bucket/model"))
    assert (found.status, type(found.error)) == ("fail", SourceCredentials)


def test_a_peer_wants_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFRAME_PEER_TOKEN", raising=False)
    assert credentials.peer(Case()).status == "ok"
    assert credentials.peer(Case(model="peer://host:1")).status == "fail"


def test_a_port_that_is_taken_says_by_whom() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        number = holder.getsockname()[1]
        found = network.port(Case(host="127.0.0.1", port=number))
        assert found.status == "fail"
        assert str(found.facts["held_by"]).startswith(f"{os.getpid()} (")
    assert network.port(Case(host="127.0.0.1", port=number)).status == "ok"


def test_the_platforms_port_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        monkeypatch.setenv("PORT", str(holder.getsockname()[1]))
        monkeypatch.setenv("K_SERVICE", "x")
        found = network.port(Case())
        # Nobody has asked for it by name: what is there runs all the same.
        assert found.status == "warning"
        assert found.facts["port"] == holder.getsockname()[1]


def test_a_model_that_does_not_fit_fails(tmp_path: Path, demo_model: Callable[..., Path]) -> None:
    small = "MemTotal: 200000 kB\nMemAvailable: 100000 kB\nHugepagesize: 2048 kB\n"
    case = rooted(tmp_path, proc__meminfo=small)
    found = machine.model_memory(Case(root=case.root, model=str(demo_model())))
    assert (found.status, type(found.error)) == ("fail", DeviceFull)
    assert machine.memory(case).status == "warning"


def test_the_cgroups_limit_counts(tmp_path: Path) -> None:
    case = rooted(
        tmp_path,
        proc__meminfo="MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        proc__self__cgroup="0::/\n",
        proc__self__mountinfo="1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    )
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("2000000000\n")
    (group / "memory.current").write_text("500000000\n")
    (group / "cpu.max").write_text("100000 100000\n")
    found = machine.memory(case)
    assert (found.facts["limit"], found.facts["available"]) == (2_000_000_000, 1_500_000_000)
    cpu = machine.cpu(case)
    assert (cpu.facts["quota"], cpu.facts["threads"], cpu.status) == (1.0, 1, "warning")


@pytest.mark.parametrize(("scope", "status"), [("0", "ok"), ("1", "ok"), ("2", "warning")])
def test_ptrace_goes_by_yama(tmp_path: Path, scope: str, status: str) -> None:
    case = rooted(tmp_path, proc__sys__kernel__yama__ptrace_scope=scope)
    assert kernel.ptrace(case).status == status


def test_namespaces_that_are_forbidden_matter_without_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = rooted(tmp_path, proc__sys__user__max_user_namespaces="0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PlatformError, match="user namespaces"):
        kernel.namespaces(case)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert kernel.namespaces(case).status == "ok"


def test_capabilities_are_those_of_this_process(tmp_path: Path) -> None:
    case = rooted(tmp_path, proc__self__status=f"CapEff:\t{1 << 40 | 1 << 19:016x}\n")
    facts = kernel.capabilities(case).facts
    assert (facts["checkpoint_restore"], facts["sys_ptrace"]) == (True, True)
    assert (facts["sys_admin"], facts["sys_resource"]) == (False, False)


def test_a_slow_clock_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sys__devices__system__clocksource__clocksource0__current_clocksource"
    case = rooted(tmp_path, **{name: "hpet\n"})
    monkeypatch.setattr(kernel, "_synchronised", lambda: True)
    assert "hpet is slow" in str(kernel.clock(case).remedy)
    monkeypatch.setattr(kernel.time, "time", lambda: 1000.0)
    assert "Set the clock" in str(kernel.clock(case).remedy)


def test_a_store_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PlatformError, match="nothing can be kept there"):
        storage.store_disk(Case(store=str(tmp_path / "not" / "yet")))


def test_a_bucket_is_no_disk() -> None:
    assert "not on a disk" in storage.store_disk(Case(store="s3://bucket/images")).says
