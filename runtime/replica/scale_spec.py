"""How many workers of a role there may be, and where: what `--prefill` and `--decode` say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coldframe.loader.errors import RequestError
from coldframe.loader.transport.base import parse_address
from coldframe.runtime.machine.device_choice import parse_device

__all__ = ["MOST_WORKERS", "DecodeSpec", "Scale"]

MOST_WORKERS = 256
"""Of one role in one replica: a number with a digit too many shall not fill the machine."""
_VLLM = re.compile(r"vllm(?:@(.*))?", re.DOTALL)
_NATIVE = "native"
_REMOTE = "tcp://"
_LISTED = ("dns://", "file://")
_SPEC = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?(?:@(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Scale:
    """The bounds of a role's workers.

    Args:
        least: So many there are as long as the replica is warm.
        most: So many there may be when there is much to do.
        device: Where they compute; None for where the replica does.
    """

    least: int = 1
    most: int = 1
    device: str | None = None

    @property
    def fixed(self) -> bool:
        """Whether their number never changes."""
        return self.least == self.most

    @classmethod
    def of(cls, wanted: int | Scale) -> Scale:
        """The bounds that a plain number stands for."""
        return cls(wanted, wanted) if isinstance(wanted, int) else wanted

    @classmethod
    def parse(cls, text: str, where: str = "") -> Scale:
        """Reads `2`, `1-4` or `1-4@cuda:0`.

        Args:
            text: What to read.
            where: Whose it is, for the error.

        Raises:
            RequestError: It is no such text, or says nothing that can be.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise RequestError(
                "this is no number of workers",
                where=where,
                expected="N, MIN-MAX, or one of them with @DEVICE",
                got=repr(text),
                hint="Write 2, 1-4 or 1-4@cuda:0.",
            )
        least = int(match[1])
        most = least if match[2] is None else int(match[2])
        if not 1 <= least <= most <= MOST_WORKERS:
            raise RequestError(
                "there cannot be so many workers",
                where=where,
                expected=f"1 <= MIN <= MAX <= {MOST_WORKERS}",
                got=text.strip(),
            )
        device = None if match[3] is None else parse_device(match[3], where)
        return cls(least, most, device)


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """Who decodes.

    Args:
        native: The bounds of the native workers; None where there are none.
        vllm: Whether there is a vLLM engine. Beside native workers it takes their place once it
            is up.
        vllm_device: Where that computes; None for where the replica does.
        remotes: `HOST:PORT` of decode workers on other hosts.
        listed: Where more of them are listed; see `loader.peers.directory`.
    """

    native: Scale | None
    vllm: bool = False
    vllm_device: str | None = None
    remotes: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()

    @property
    def scale(self) -> Scale:
        """The bounds of the native workers, where there are none as well."""
        return self.native or Scale(0, 0, self.vllm_device)

    @classmethod
    def parse(cls, text: str, where: str = "--decode") -> DecodeSpec:
        """Reads what `Scale` does, `vllm`, `vllm@cuda:0`, or both as `native,vllm` or `1-4,vllm`.

        Beside them, or alone, decode workers on other hosts: `tcp://HOST:PORT` for each, and
        `dns://NAME:PORT` or `file:///PATH` where they are listed.

        Args:
            text: What to read.
            where: Whose it is, for the error.

        Raises:
            RequestError: It is no such text, or says nothing that can be.
        """
        native: Scale | None = None
        vllm: re.Match[str] | None = None
        parts = [part.strip() for part in text.split(",")]
        remotes = tuple(part[len(_REMOTE) :] for part in parts if part.startswith(_REMOTE))
        listed = tuple(part for part in parts if part.startswith(_LISTED))
        if any(parse_address(remote) is None for remote in remotes) or not _are_places(listed):
            raise _no_engines(text, where)
        for part in parts:
            if part.startswith((_REMOTE, *_LISTED)):
                continue
            if "://" in part:
                raise _no_engines(text, where)
            engine = _VLLM.fullmatch(part)
            if (vllm if engine else native) is not None:
                raise _no_engines(text, where)
            if engine is not None:
                vllm = engine
            else:
                native = Scale() if part == _NATIVE else Scale.parse(part, where)
        if vllm is None:
            return cls(native, remotes=remotes, listed=listed)
        device = None if vllm[1] is None else parse_device(vllm[1], where)
        return cls(native, True, device, remotes, listed)


def _are_places(texts: tuple[str, ...]) -> bool:
    """Whether decode workers may be listed there."""
    if not texts:
        return True
    from coldframe.loader.peers.directory import check_peers  # each worker imports this module

    try:
        check_peers((), texts)
    except RequestError:
        return False
    return True


def _no_engines(text: str, where: str) -> RequestError:
    return RequestError(
        "this does not say who decodes",
        where=where,
        expected="native workers, a vLLM engine, or one of each; and tcp://HOST:PORT, "
        "dns://NAME:PORT or file:///PATH of those on other hosts",
        got=repr(text),
        hint="Write 2, 1-4, vllm, vllm@cuda:0, native,vllm, native,tcp://HOST:PORT or "
        "dns://NAME:PORT.",
    )
