"""What a process says in an interpreter that is not ours, before any code of ours runs there.

That interpreter may lack this package, or be too old to read it: then there is nobody who could say
so over a socket, and what stands on standard error is for whoever reads logs. So the first of it
is kept, and goes into the error; `loader.process.speak_up` ends that.
"""

from __future__ import annotations

import os

from coldframe.loader.errors import PlatformError

__all__ = ["FirstWords"]

_MOST = 600


class FirstWords:
    """What one process says at first.

    Args:
        python: Its interpreter.

    Attributes:
        fd: To be its standard error until it speaks up.
    """

    def __init__(self, python: str) -> None:
        self.fd = os.memfd_create("first-words")
        self._python = python
        self._said: str | None = None

    def end(self) -> str:
        """What was said, which goes to this process's standard error, too; then there is no more.

        May be called again.
        """
        if self._said is None:
            said = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
            os.close(self.fd)
            if said:
                os.write(2, said)
            self._said = said.decode(errors="replace").strip()
        return self._said

    def error(self, ending: str) -> PlatformError:
        """What is told where it has ended before it said anything over its socket.

        Args:
            ending: How it has ended.
        """
        said = self.end()
        # The last lines of a traceback say what was missing.
        last = said[-_MOST:].partition("\n")[2] if len(said) > _MOST else said
        return PlatformError(
            "the Python that is to run vLLM has ended before it had coldframe or vLLM",
            where=f"--vllm-python {self._python}",
            expected="one that can import vLLM and this coldframe",
            got=f"{ending}: {last}" if last else ending,
            hint="Install both for that Python (3.11 or later), or name another.",
        )
