from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.renderer import Renderer
from tests.support import unavailable

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def processes() -> list[psutil.Process]:
    """The process that is forked, and its forks."""
    found = psutil.Process().children(recursive=True)
    living = []
    for child in found:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it has ended meanwhile
            if child.status() != psutil.STATUS_ZOMBIE:
                assert "template_process" in " ".join(child.cmdline())
                living.append((child.ppid() != os.getpid(), child))
    return [child for _, child in sorted(living, key=lambda pair: pair[0])]


def end(process: psutil.Process) -> None:
    """Kills it; returns when its parent, or the kernel, has noticed."""
    process.send_signal(signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):  # it may be reaped between the two questions
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)


@pytest.mark.heavy
def test_a_template_that_loops_is_ended_and_the_next_one_runs(no_leaks: object) -> None:
    renderer = Renderer(deadline_s=1)
    try:
        for template in (LOOP, "{{ (9 ** x) ** (9 ** x) }}"):
            with pytest.raises(ApiError, match="longer than 1 s") as caught:
                renderer.render(template, {"x": 9})
            assert (caught.value.status, caught.value.code) == (400, "chat_template")
            assert renderer.render("{{ x }}", {"x": "on"}) == "on"
            assert len(processes()) == 2
    finally:
        renderer.close()
    with pytest.raises(ApiError, match="shutting down"):
        renderer.render("", {})


def test_at_rest_only_the_process_that_is_forked_is_there(no_leaks: object) -> None:
    renderer = Renderer()
    try:
        renderer.rest()  # there is none yet
        assert renderer.render("{{ x }}", {"x": "on"}) == "on"
        renderer.rest()
        (parent,) = processes()
        assert renderer.render("{{ x }}", {"x": "again"}) == "again"
        assert processes()[0] == parent
    finally:
        renderer.close()


def test_closing_does_not_wait_for_a_template(no_leaks: object) -> None:
    renderer = Renderer(deadline_s=600)
    renderer.prepare(LOOP)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(renderer.render, LOOP, {})
        queued = pool.submit(renderer.render, LOOP, {})
        while not renderer._lock.locked():
            time.sleep(0.001)
        renderer.close()
        for future in (waiting, queued):
            with pytest.raises(ApiError) as caught:
                future.result(timeout=10)
            assert caught.value.status == 503


def test_processes_that_somebody_has_killed_are_replaced(no_leaks: object) -> None:
    renderer = Renderer()
    try:
        for which in (0, 1):
            assert renderer.render("{{ x }}", {"x": 1}) == "1"
            end(processes()[which])
            while which == 0 and processes():  # its fork ends with it
                time.sleep(0.001)
            assert renderer.render("{{ x }}", {"x": 2}) == "2"
            assert len(processes()) == 2
    finally:
        renderer.close()


def test_a_process_that_is_killed_at_work_is_replaced(no_leaks: object) -> None:
    renderer = Renderer(deadline_s=0.5)
    try:
        renderer.prepare(LOOP)
        with ThreadPoolExecutor() as pool:
            first = processes()[1]
            waiting = pool.submit(renderer.render, LOOP, {})
            while first.cpu_times().user < 0.05:
                time.sleep(0.001)
            end(first)
            with pytest.raises(ApiError, match="longer than"):  # the second one's end
                waiting.result(timeout=60)
    finally:
        renderer.close()


def test_a_template_s_process_can_do_nothing_but_answer(
    monkeypatch: pytest.MonkeyPatch, no_leaks: object
) -> None:
    monkeypatch.setenv("COLDFRAME_API_KEYS", "secret")
    renderer = Renderer(memory_bytes=300 << 20)
    try:
        renderer.render("{{ x }}", {"x": 1})
        parent, fork = processes()
        for process in (parent, fork):
            with open(f"/proc/{process.pid}/environ", "rb") as file:
                assert b"secret" not in file.read()
            status = status_of(process.pid)
            assert status["NoNewPrivs"] == "1"
            assert all(int(status[name], 16) == 0 for name in ("CapPrm", "CapEff", "CapInh"))
            assert status["Threads"] == "1"
        folder = f"/proc/{fork.pid}/fd"
        held = {name: os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
        assert {held.pop(name) for name in "012"} == {"/dev/null"}
        assert len(held) == 1
        assert held["3"].startswith("socket:")
        limits = {
            name: psutil.Process(fork.pid).rlimit(getattr(psutil, f"RLIMIT_{name}"))
            for name in ("AS", "NOFILE", "NPROC", "FSIZE", "CORE")
        }
        assert limits.pop("AS") == (300 << 20, 300 << 20)
        assert set(limits.values()) == {(0, 0)}
        if status_of(os.getpid())["Seccomp"] == "0":  # nobody else's filter is in its way
            assert status_of(fork.pid)["Seccomp"] == "2"
    finally:
        renderer.close()


def status_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


_BECOMES_NOBODY = """
import os
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.renderer import Renderer
from coldframe.snapshot.identity import Identity

renderer = Renderer(deadline_s=0.3)
renderer.start()
renderer.settle(Identity(65532, 65532, ()))
os.setgroups([])
os.setresgid(65532, 65532, 65532)
os.setresuid(65532, 65532, 65532)
try:
    renderer.render(LOOP, {})
except ApiError as error:
    assert error.status == 400, error
print(renderer.render("{{ x }}", {"x": "on"}))
pid = renderer._fork[1].inside()
print(*next(line for line in open(f"/proc/{pid}/status") if line.startswith("Uid:")).split())
renderer.close()
"""


def test_a_gateway_that_has_become_nobody_still_gets_new_processes() -> None:
    if os.geteuid() != 0:
        unavailable("to become another user wants root")
    code = f"LOOP = {LOOP!r}" + _BECOMES_NOBODY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("on\nUid: 65532 65532 65532 65532\n", "")


def test_who_may_not_become_that_user_gets_an_error() -> None:
    if os.geteuid() != 0:
        unavailable("to start as root and give that up wants root")
    code = """
from coldframe.runtime.gateway.renderer import Renderer
from coldframe.runtime.gateway.api import ApiError
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import confine
confine()
renderer = Renderer()
renderer.settle(Identity(65532, 65532, ()))
try:
    renderer.render("", {})
except ApiError as error:
    print(error.status)
renderer.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("503\n", "")
