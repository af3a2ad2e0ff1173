"""Which coldframe this is, for processes of ours that run in another interpreter than the front.

What they say to one another has no versions of its own: both ends are of one release, and change
together. An environment that has vLLM has its own copy of this package, which may be another one.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.wire import Channel
from coldframe.snapshot.machine import own_sources

__all__ = ["BUILD", "Build", "agree"]

BUILD = "COLDFRAME_BUILD"
"""The variable that tells a process of ours whose build it is to have."""

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Build(NamedTuple):
    """A copy of this package.

    Attributes:
        version: The release's, or `unreleased` where it is imported from sources alone.
        sources: A hash of its modules; see `own_sources`.
        where: Its folder.
    """

    version: str
    sources: str
    where: str

    @classmethod
    def here(cls) -> Build:
        """This process's own; reads all of its sources."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            release = version("coldframe")
        except PackageNotFoundError:
            release = "unreleased"
        return cls(release, own_sources(), _ROOT)

    def __str__(self) -> str:
        return f"coldframe {self.version}, sources {self.sources}, in {self.where}"

    def to_environment(self) -> str:
        return "\n".join(self)

    @staticmethod
    def from_environment(text: str) -> Build:
        version, sources, where = text.split("\n", 2)
        return Build(version, sources, where)

    def check(self, wanted: Build) -> None:
        """Refuses another build than the one that is wanted.

        Raises:
            PlatformError: It is another one.
        """
        if self.sources != wanted.sources:
            raise PlatformError(
                "the Python that has vLLM has another coldframe than this replica",
                where=f"--vllm-python {sys.executable}",
                expected=wanted,
                got=self,
                hint="Install the same one for both.",
            )


def agree(control_fd: int) -> None:
    """Ends a process that is of another build than the front that has started it, and says so.

    Args:
        control_fd: The socket to the front.
    """
    wanted = os.environ.pop(BUILD, None)
    if wanted is None:
        return
    try:
        Build.here().check(Build.from_environment(wanted))
    except ColdframeError as error:
        Channel.from_fd(control_fd).send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
