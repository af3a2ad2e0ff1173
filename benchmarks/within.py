"""Another program within a limit, behind which it is ended with all that it has started."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from coldframe.benchmarks.interruption import end, unbroken

__all__ = ["run_within"]


def run_within(
    command: Sequence[str],
    seconds: float | None,
    environment: Mapping[str, str] | None = None,
    grace_s: float = 0.0,
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process group of its own, which ends where it is late.

    Its session is the caller's, so that whoever ends that ends it, too.

    Args:
        command: The program with its arguments.
        seconds: How long it may take; None is for ever.
        environment: Its own; None is the caller's.
        grace_s: How long it may take to end in order, where it is ended; in seconds. For what
            starts others in groups of their own.

    Returns:
        Its exit status, and what it has printed.

    Raises:
        subprocess.TimeoutExpired: It was not done by then.
    """
    with ExitStack() as stack:
        # Known to the stack before a signal can end it.
        with unbroken():
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    process_group=0,
                )
            )
            stack.push(partial(_ended, process, grace_s))
        out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def _ended(process: subprocess.Popen[str], grace_s: float, kind: object, *_: object) -> None:
    if kind is not None:
        end(process, group=True, grace_s=grace_s)
