"""A rehearsal's processes: started apart from whatever serves here, and never longer there than us.

They have nothing of a replica's settings nor of a platform's, so that none of them takes the place
of the one that is there: no jobs are fetched, no port of the platform's is bound. They die with
who started them, however that ends, and where memory is short they are the first to go.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from coldframe.loader.errors import PlatformError
from coldframe.loader.process import die_with_parent
from coldframe.runtime.commands.own import coldframe_command
from coldframe.runtime.gateway.platforms.table import PROFILES, SIGNS

__all__ = ["bare_environment", "end_process", "held", "read_until", "start_process", "terminable"]

_KEPT = ("COLDFRAME_RUN_DIR", "COLDFRAME_CRIU")
_PREFIXES = ("COLDFRAME_", "RUNPOD_", "AIP_", "SAGEMAKER_", "AZUREML_")
_END_S = 10.0
_FIRST_TO_GO = "1000"


def bare_environment() -> dict[str, str]:
    """This process's environment without what tells a replica, or a platform's container, anything.

    A rehearsal is of the defaults, but for what is said.
    """
    named = _platform_variables()
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name in named or name.startswith(_PREFIXES))
    }


def _platform_variables() -> set[str]:
    """All that is in the platforms' table: what they are known by, and what they set."""
    found = {sign for _, signs in SIGNS for sign in signs if not sign.startswith("/")}
    for profile in PROFILES:
        found |= {*profile.ports, *profile.models, *profile.names}
        found |= {route.variable for route in profile.routes if route.variable}
        if profile.health_variable is not None:
            found.add(profile.health_variable)
    return found


def start_process(
    command: Sequence[str], environment: Mapping[str, str], *, stdout: int, stderr: int
) -> subprocess.Popen[bytes]:
    """Starts `coldframe` with these arguments, from the main thread.

    Args:
        command: Its arguments.
        environment: What it is told beside `bare_environment`.
        stdout: As `subprocess` has it.
        stderr: Likewise.

    Raises:
        OSError: It cannot be started.
    """
    parent = os.getpid()

    def tied() -> None:
        die_with_parent(parent)
        # A replica that serves beside it is not to pay for a rehearsal.
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(_FIRST_TO_GO)

    return subprocess.Popen(
        [*coldframe_command(), *command],
        env={**bare_environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=tied,
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """In good order where it listens to that, and with all that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def read_until(process: subprocess.Popen[bytes], nbytes: int, patience_s: float) -> bytes:
    """What a process has written to its pipe, once that are some bytes at least.

    Args:
        process: One whose standard output is a pipe, of which nobody else reads.
        nbytes: How many are wanted.
        patience_s: How long to wait for them.

    Raises:
        PlatformError: It ended before, or did not write them in time.
    """
    assert process.stdout is not None
    fd = process.stdout.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    until = time.monotonic() + patience_s
    said = b""
    while len(said) < nbytes:
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise PlatformError(
                "a rehearsal says nothing", expected=f"within {patience_s:g} s", got=repr(said)
            )
        part = os.read(fd, 1 << 12)
        if not part:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            raise PlatformError("a rehearsal failed", got=f"exit status {process.returncode}")
        said += part
    return said


@contextmanager
def held(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stands still while the context lasts: what it would end is still there to be looked at."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextmanager
def terminable() -> Iterator[None]:
    """While the context lasts, a request to end goes through the stack, so that all is cleared up.

    A second one does not disturb that. SIGHUP is left alone where it is ignored, as nohup wants.
    """

    def end(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # one that was not set from Python
                signal.signal(number, handler)
