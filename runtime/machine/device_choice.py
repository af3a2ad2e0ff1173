"""On what a replica computes: what `--device` says, and what `auto` makes of it here.

The front never loads a driver: that takes a second, and on most machines there is none. So `auto`
only looks for what a GPU would show to this process. Whether it can be used is found out by those
who use it; where nobody has asked for it by name, the replica takes the CPU then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from coldframe.loader.errors import PlatformError, RequestError

if TYPE_CHECKING:
    from coldframe.runtime.flags.parser import Parser

__all__ = [
    "AUTO",
    "CPU",
    "DeviceChoice",
    "add_device_argument",
    "choose_device",
    "kind_of",
    "parse_device",
]

AUTO = "auto"
CPU = "cpu"
_FIRST_GPU = "cuda:0"
_DEVICE = re.compile(r"cpu|cuda(?::([0-9]{1,4}))?")
_CONTROL = "dev/nvidiactl"
_GPU = r"nvidia[0-9]+"
_BINDINGS = "cuda.bindings"
_CPU_TORCH = "+cpu"
"""How the version of a torch ends that was built without CUDA."""


class DeviceChoice(NamedTuple):
    """What a replica computes on.

    Attributes:
        device: `cpu` or `cuda:N`.
        why: Why that one, where nobody has named it.
        fall_back: Whether the CPU stands in where it cannot be used.
    """

    device: str = CPU
    why: str | None = None
    fall_back: bool = False


def add_device_argument(parser: Parser) -> None:
    """The flag that says on what."""
    parser.flag(
        "--device",
        metavar="DEVICE",
        default=AUTO,
        help="what to compute on: cpu, cuda or cuda:N; auto takes the first GPU that this process "
        "can see, and the CPU where there is none or it cannot be used (auto)",
    )


def parse_device(text: str, where: str = "") -> str:
    """A device's name as it is written everywhere else: `cpu` or `cuda:N`.

    Args:
        text: `cpu`, `cuda` or `cuda:N`.
        where: Whose it is, for the error.

    Raises:
        RequestError: It is none.
    """
    match = _DEVICE.fullmatch(text)
    if match is None:
        raise RequestError(
            "there is no such device", where=where, expected="cpu, cuda or cuda:N", got=repr(text)
        )
    return CPU if text == CPU else f"cuda:{int(match[1] or 0)}"


def kind_of(device: str) -> str:
    """`cpu`, or `cuda` for any GPU: what an image is for."""
    return device.partition(":")[0]


def choose_device(
    wanted: str,
    named: Iterable[str | None] = (),
    root: str | Path = "/",
    environ: Mapping[str, str] = os.environ,
) -> DeviceChoice:
    """What `--device` stands for on this machine.

    Args:
        wanted: Its value; an empty one is `auto`, as where a platform sets all variables that it
            knows.
        named: What roles of workers say of their own (`--prefill 2@cuda:0`), which counts where
            the flag leaves it open.
        root: Where `/dev` is looked for.
        environ: Where CUDA_VISIBLE_DEVICES may be.

    Raises:
        RequestError: There is no such device.
    """
    wanted = wanted.strip()
    if wanted not in ("", AUTO):
        return DeviceChoice(parse_device(wanted, "--device"))
    for name in named:
        if name is not None:
            return DeviceChoice(name)
    why = _why_none(Path(root), environ)
    if why is not None:
        return DeviceChoice(CPU, why)
    return DeviceChoice(_FIRST_GPU, "this process can see a GPU", fall_back=True)


def _why_none(root: Path, environ: Mapping[str, str]) -> str | None:
    """Why it looks as if this process had no GPU; None where it looks as if it had one."""
    # By far the most frequent answer, and one system call.
    if not (root / _CONTROL).exists():
        return f"there is no {root / _CONTROL}"
    try:
        found = any(re.fullmatch(_GPU, name) for name in os.listdir(root / "dev"))
    except OSError as error:
        return f"{root / 'dev'} cannot be read: {error.strerror}"
    if not found:
        return f"{root / 'dev'} has no GPU"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    # The driver takes them up to the first one that is none, so that this hides all.
    if visible is not None and visible.partition(",")[0].strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    # Slow to import, and seldom needed.
    import importlib.util

    from coldframe.snapshot.machine import torch_version

    try:
        bound = importlib.util.find_spec(_BINDINGS) is not None
        torch = torch_version()
    except (ImportError, ValueError):
        bound = False
    except PlatformError as error:
        return str(error)
    if not bound:
        return "the bindings to the CUDA driver (coldframe[cuda]) are not installed"
    return f"torch {torch} is for the CPU alone" if torch.endswith(_CPU_TORCH) else None
