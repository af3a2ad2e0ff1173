"""Whether weights that come from elsewhere are those of the MODEL that vLLM was given.

vLLM has config and tokenizer from its MODEL. Where a memory service or a `source` has the weights,
they may be another model's: those of a fine-tune fit its base, and vLLM would serve the one by the
name of the other. So where MODEL has weights of its own, those that come are held against them.

One and the same seal is enough. Else a few bytes in the middle of every tensor must be the same,
stage by stage as they come in: training leaves hardly a tensor as it was, and to read all of them
twice would take as long as the load. What was changed elsewhere in a tensor is not found.

Without torch and vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from math import prod

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.header import TensorInfo
from coldframe.loader.checkpoints.plan import Placement, Plan
from coldframe.loader.errors import CheckpointError, ColdframeError, RequestError, SourceNotFound
from coldframe.loader.files import open_regular, pread_exactly
from coldframe.loader.sources.location import Directory, Hub, parse_location

__all__ = ["Witness"]

_log = logging.getLogger("vllm.coldframe")

_MOST = 256
"""Bytes of a tensor that are looked at."""

Look = Callable[[int, int], bytes]
"""Bytes of the arena, by offset and length."""


class Witness:
    """The weights that vLLM's MODEL has of its own.

    Args:
        checkpoint: Them, in a local directory. They stay there; nothing is read yet.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._fds: dict[int, int] = {}

    @staticmethod
    def of(place: str) -> Witness | None:
        """That of a MODEL; None where it has no weights on this machine.

        Args:
            place: A directory, or what the hub calls it. Nothing is asked of a network.
        """
        directory = _directory(place)
        if directory is None:
            return None
        try:
            return Witness(Checkpoint.open(directory))
        except SourceNotFound:
            return None  # its config and tokenizer are all that is there, and all that vLLM needs
        except ColdframeError as error:
            # Nobody reads them: a clone without its large files, say.
            _log.warning("The weights are not held against those of %s: %s", place, error)
            return None

    def vouches_for(self, plan: Plan) -> bool:
        """Whether the weights of a plan are the same to the last bit, by their seal."""
        return (
            self._checkpoint.seal is not None and self._checkpoint.fingerprint == plan.fingerprint
        )

    def announce(self, placements: Iterable[Placement]) -> None:
        """Has the kernel read what will be looked at, so that nobody waits for it then."""
        for placement in placements:
            found = self._checkpoint.tensors.get(placement.name)
            if found is None or not _alike(found, placement):
                continue  # `check` says so
            at, _, length = _sample(placement)
            os.posix_fadvise(
                self._fd(found.shard), found.offset + at, length, os.POSIX_FADV_WILLNEED
            )

    def check(self, placements: Iterable[Placement], look: Look) -> None:
        """Holds tensors that are in against those here.

        Args:
            placements: The tensors, or a rank's slices of them.
            look: Reads the arena.

        Raises:
            CheckpointError: They are others.
            SourceError: Those here cannot be read.
        """
        for placement in placements:
            found = self._checkpoint.tensors.get(placement.name)
            if found is None or not _alike(found, placement):
                there = "no such tensor" if found is None else f"{found.dtype} {list(found.shape)}"
                whole = list(placement.whole or placement.shape)
                raise self._others(placement, there, f"{placement.dtype} {whole}")
            at, arena_offset, length = _sample(placement)
            if not length:
                continue
            fd, uri = self._fd(found.shard), self._checkpoint.shards[found.shard].uri
            ours = pread_exactly(fd, uri, length, found.offset + at)
            if look(arena_offset, length) != ours:
                raise self._others(
                    placement, f"{length} bytes at {found.offset + at} of {uri}", "other bytes"
                )

    def close(self) -> None:
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)

    def _fd(self, shard: int) -> int:
        if shard not in self._fds:
            fd, _ = open_regular(self._checkpoint.shards[shard].uri)
            # A page for each tensor: what is behind it is of no interest.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            self._fds[shard] = fd
        return self._fds[shard]

    def _others(self, placement: Placement, expected: str, got: str) -> CheckpointError:
        return CheckpointError(
            "the weights that come are not those of vLLM's MODEL",
            where=f"{self._checkpoint.path}, tensor {placement.name}",
            expected=expected,
            got=got,
            hint="Give vLLM's MODEL and the source, or the memory service, one and the same model."
            " Where other weights are meant, let MODEL be a directory without any.",
        )


def _directory(place: str) -> str | None:
    try:
        location = parse_location(place)
    except RequestError:  # whoever loads it says what is wrong
        return None
    match location:
        case Directory(path):
            return path
        case Hub():
            from coldframe.loader.web.hub_cache import find_cached

            return find_cached(location.repo, location.revision)
    return None


def _alike(found: TensorInfo, placement: Placement) -> bool:
    whole = placement.whole or placement.shape
    return (found.dtype, found.shape) == (placement.dtype, whole)


def _sample(placement: Placement) -> tuple[int, int, int]:
    """What of a tensor is looked at: the first bytes of the row in the middle, of a slice its own.

    Returns:
        Where that is from the whole tensor's first byte, where it is in the arena, and its length.
    """
    shape = placement.shape
    count = prod(shape)
    if not placement.nbytes or placement.nbytes % count:  # packed elements are never cut
        return 0, placement.arena_offset, 0 if placement.whole else min(_MOST, placement.nbytes)
    size = placement.nbytes // count
    row = [length // 2 for length in shape[:-1]] + [0] * bool(shape)
    begin = placement.begin or (0,) * len(shape)
    length = min(_MOST, size * (shape[-1] if shape else 1))
    at = _flat([r + b for r, b in zip(row, begin, strict=True)], placement.whole or shape)
    return at * size, placement.arena_offset + _flat(row, shape) * size, length


def _flat(index: Iterable[int], shape: tuple[int, ...]) -> int:
    found = 0
    for place, length in zip(index, shape, strict=True):
        found = found * length + place
    return found
