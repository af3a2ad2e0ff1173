"""Another program within a limit, behind which it is ended with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

__all__ = ["run_within"]


def run_within(
    command: Sequence[str],
    seconds: float | None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process group of its own, which ends where it is late.

    Its session is the caller's, so that whoever ends that ends it, too.

    Args:
        command: The program with its arguments.
        seconds: How long it may take; None is for ever.
        environment: Its own; None is the caller's.

    Returns:
        Its exit status, and what it has printed.

    Raises:
        subprocess.TimeoutExpired: It was not done by then.
    """
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)
