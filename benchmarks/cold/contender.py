"""What is measured beside coldframe's own cells: another program's start, by the same clock.

The benchmark asks each contender for one start that does not count, and then for one in every
round, between its own cells. The page cache is made what it is to be before each; a contender
leaves it alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coldframe.loader.errors import PlatformError

__all__ = ["CONTENDERS", "Asked", "Contender", "Outcome", "contender"]

CONTENDERS = {
    "vllm": "vLLM's own server, eager",
    "vllm-compiled": "the same, compiled at each start",
    "vllm-compiled-kept": "the same with what an earlier start has compiled",
    "transformers": "a script that loads by Transformers and generates",
    "fastapi": "a FastAPI app around Transformers, as containers have it",
}
"""Those that there are, by name, and what they are."""

_MODULE = "coldframe.benchmarks.cold.peers"
"""Has `open_contender(name, asked) -> Contender`; imported where one is asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What every start of a contender is about.

    Args:
        model: The checkpoint's directory.
        prompt: Token ids.
        tokens: How many to generate, greedily and past the end of a sequence.
        device: `cpu` or `cuda:N`.
        vllm_python: An interpreter that has vLLM, or None.
        limit_s: How long one start may take, in seconds.
    """

    model: Path
    prompt: Sequence[int]
    tokens: int
    device: str = "cpu"
    vllm_python: str | None = None
    limit_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One start from the exec, as it looks from outside.

    Args:
        ttft_s: From just before the exec until the first token was read, over HTTP by the client
            that knocks from the exec on.
        last_token_s: From there until the last one was.
        tokens: The ids that came.
        memory: PSS of all its processes after the answer, in bytes; None where it cannot be told.
    """

    ttft_s: float
    last_token_s: float
    tokens: tuple[int, ...]
    memory: int | None


class Contender(Protocol):
    """Another program.

    Attributes:
        name: One of `CONTENDERS`; `who` of its cells.
        through: `http`, or `run` for a script that prints its answer.
    """

    @property
    def name(self) -> str: ...

    @property
    def through(self) -> str: ...

    def start(self) -> Outcome:
        """Starts it, asks it, and ends it with all that it has started.

        Raises:
            PlatformError: It failed.
        """
        ...


def contender(name: str, asked: Asked) -> Contender:
    """The contender of that name.

    Args:
        name: One of `CONTENDERS`.
        asked: What it is to do.

    Raises:
        PlatformError: It cannot be measured here, as what it needs is not installed.
    """
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        raise PlatformError("this contender cannot be started here", got=str(error)) from error
    made: Contender = module.open_contender(name, asked)
    return made
