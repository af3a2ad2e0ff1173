"""Rehearsals beside a replica that serves: they take nothing that is its own, and leave nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from coldframe.loader.errors import PlatformError
from coldframe.runtime.gateway.platforms.table import PROFILES, SIGNS, detect
from coldframe.runtime.planning import processes
from coldframe.runtime.planning.footprint import footprint
from coldframe.runtime.planning.processes import bare_environment, end_process, read_until
from coldframe.runtime.planning.room import PROCESSES_BYTES, rehearsal_room
from coldframe.runtime.planning.scratch import PREFIX, scratch
from tests.runtime.snapshots import COLDFRAME
from tests.support import without_settings

Make = Callable[..., Path]
_RUNPOD = {
    "RUNPOD_POD_ID": "a-pod",
    "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:1/job",
    "RUNPOD_AI_API_KEY": "planted",
    "PORT": "80",
}


@pytest.mark.parametrize("signs", [signs for _, signs in SIGNS])
def test_a_rehearsal_is_on_no_platform(
    signs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for sign in signs:
        if not sign.startswith("/"):
            monkeypatch.setenv(sign, "tcp://planted:80")
    assert detect(bare_environment(), (), lambda _: False).name == "generic"


def test_nothing_that_a_platform_or_a_user_has_set_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {name for profile in PROFILES for name in (*profile.ports, *profile.models)}
    given = [*_RUNPOD, *named, "COLDFRAME_API_KEYS", "COLDFRAME_DECODE", "SAGEMAKER_OTHER"]
    for name in given:
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("COLDFRAME_RUN_DIR", "/run/mine")
    found = bare_environment()
    assert "planted" not in found.values()
    assert found["COLDFRAME_RUN_DIR"] == "/run/mine"
    assert found["PATH"] == os.environ["PATH"]


def planning(model: Path, base: Path, **env: str) -> subprocess.Popen[bytes]:
    changed = {**without_settings(), **env, "XDG_CACHE_HOME": str(base), "TMPDIR": str(base)}
    return subprocess.Popen(
        [COLDFRAME, "plan", str(model), "--json"],
        env=changed,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def offspring(pid: int, word: str) -> list[psutil.Process]:
    """All that descends from a rehearsal, once one with that word in its command line is there."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        children = psutil.Process(pid).children(recursive=True)
        for child in children:
            try:
                if word in child.cmdline() and len(child.children(recursive=True)) > 1:
                    return [child, *child.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)
    raise AssertionError("no rehearsal was seen")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.heavy)]
)
def test_a_plan_that_is_ended_leaves_nothing(
    demo_model: Make, tmp_path: Path, number: signal.Signals
) -> None:
    process = planning(demo_model("llama", "bfloat16"), tmp_path, **_RUNPOD)
    try:
        found = offspring(process.pid, "run")
        for each in found:
            with psutil.Process(each.pid).oneshot():
                # The first to go where memory is short, before a replica that serves.
                score = Path(f"/proc/{each.pid}/oom_score_adj").read_text()
                assert int(score) == 1000
        assert "RUNPOD_WEBHOOK_GET_JOB" not in found[0].environ()
        process.send_signal(number)
        status = process.wait(60)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    assert status == (128 + number if number == signal.SIGTERM else -number)
    _, alive = psutil.wait_procs(found, timeout=30)
    assert alive == []
    left = [path for path in tmp_path.iterdir() if path.name.startswith(PREFIX)]
    if number == signal.SIGTERM:
        assert left == []
    else:  # nobody could clear up: the next one does
        assert len(left) == 1
        with scratch(str(tmp_path)):
            assert not left[0].exists()


def test_what_is_in_use_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}left").mkdir()
    (tmp_path / "of-others").mkdir()
    with scratch(str(tmp_path)) as first, scratch(str(tmp_path)) as second:
        assert first != second
        assert sorted(os.listdir(tmp_path)) == sorted(
            [os.path.basename(first), os.path.basename(second), "of-others"]
        )
    assert os.listdir(tmp_path) == ["of-others"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(60)", "says nothing"),
        ("print('x', flush=True); import time; time.sleep(60)", "says nothing"),
        ("print('x')", "failed"),
    ],
)
def test_one_that_does_not_answer_is_not_waited_for_for_ever(code: str, why: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        with pytest.raises(PlatformError, match=why):
            read_until(process, 8, 0.3 if "sleep" in code else 60)
    finally:
        end_process(process)


def test_a_second_request_to_end_does_not_disturb_the_first() -> None:
    code = (
        "import os, signal\n"
        "from coldframe.runtime.planning.processes import terminable\n"
        "with terminable():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); print('cleared', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.stdout, done.returncode) == (b"cleared\n", 128 + signal.SIGTERM)


# -- memory ------------------------------------------------------------------------------------


def machine(root: Path, available: int, limit: int | None = None, used: int = 0) -> Path:
    """A /proc and a cgroup with that much memory."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("0::/\n")
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("inactive_file 0\n")
    return root


def test_a_scale_model_has_room_thrice(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    spare = 30 << 20
    root = machine(tmp_path / "roomy", PROCESSES_BYTES + spare)
    assert rehearsal_room(str(tmp_path), root) == min(free // 2, spare // 3)


@pytest.mark.parametrize("available", [PROCESSES_BYTES, 1 << 20])
def test_beside_a_replica_in_a_tight_cgroup_nothing_is_rehearsed(
    tmp_path: Path, available: int
) -> None:
    root = machine(tmp_path / "tight", 64 << 30, limit=4 << 30, used=(4 << 30) - available)
    with pytest.raises(PlatformError, match="take memory from what runs here"):
        rehearsal_room(str(tmp_path), root)


def test_what_a_rehearsal_is_called_with_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_CRIU", "/opt/criu")
    assert processes.bare_environment()["COLDFRAME_CRIU"] == "/opt/criu"


def test_forks_of_a_template_are_weighed_with_the_replica() -> None:
    """They descend from the template, not from the front; the template is not the replica's."""
    code = (
        "import os, sys\n"
        "if os.fork():\n"  # the command
        "    sys.stdin.read(); os.wait(); sys.exit()\n"
        "held = bytearray(os.urandom(8 << 20))\n"
        "if os.fork():\n"  # the template that it has made
        "    sys.stdin.read(); os.wait(); sys.exit()\n"
        "mine = bytearray(os.urandom(24 << 20)); os.write(1, b'x'); sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", code], **pipes) as template,
        subprocess.Popen(["cat"], **pipes) as front,
    ):
        read_until(template, 1, 60)
        alone, whole = footprint(front.pid), footprint(front.pid, template.pid)
        assert set(alone.processes) == {"front"}
        assert set(whole.processes) == {"front", "worker"}
        # Its own pages, and its half of what it has from the template.
        assert (24 + 4) << 20 <= whole.processes["worker"] < (24 + 8 + 16) << 20
        template.communicate(b"")
        front.communicate(b"")
