"""Random numbers in clones: every generator that the image holds gets a seed of its own.

All clones of an image start with the same bits, and with the same process id, so what tells a
fork from its parent tells nothing here. Found and reseeded:

- every `random.Random`, `torch.Generator`, `numpy.random.RandomState` and `numpy.random.Generator`
  that the garbage collector can reach, and the defaults of these libraries;
- libc's `random`, `rand` and `drand48`;
- OpenSSL's, which looks at the process id and the clock only. Reseeding its root has the others
  below it reseed at their next use (OpenSSL 3, `RAND_add` and EVP_RAND(7));
- glibc's own, behind `getrandom` (2.41 on): its state lies in droppable memory, which is emptied
  before the freeze, so that the first use asks the kernel again.

What no hook can change, because it was decided when the process started: the hash seed of Python's
strings, the addresses of everything, and libc's stack canary. They are the same in all clones. So
are generators that C code keeps to itself, and the children that a numpy generator would `spawn`:
a hook of their owner's has to see to those (`snapshot/hooks.py`).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

__all__ = ["Generators", "forget_kernel_randomness"]

_MADV_DONTNEED = 4


class Generators:
    """The random number generators of this process, found now and reseeded later.

    Finding takes a few tenths of a second, so it is done before the freeze.
    """

    def __init__(self) -> None:
        kinds = _kinds()
        # What is frozen already is out of the collector's sight.
        gc.unfreeze()
        found: dict[int, Any] = {}
        for holder in gc.get_objects():
            for each in (holder, *gc.get_referents(holder)):
                # Not isinstance: torch's answers imports modules, and others' may run anything.
                if not kinds.isdisjoint(type(each).__mro__):
                    found[id(each)] = each
        for each in _defaults():
            found[id(each)] = each
        self.found: list[Any] = list(found.values())
        self._libc = ctypes.CDLL(None)

    def reseed(self) -> None:
        """Gives each a seed from the kernel."""
        for generator in self.found:
            module = type(generator).__module__
            if hasattr(generator, "manual_seed"):
                generator.manual_seed(_number(8))
            elif module.startswith("numpy"):
                _reseed_numpy(generator)
            else:
                generator.seed(_number(64))
        self._libc.srandom(ctypes.c_uint(_number(4)))
        self._libc.seed48((ctypes.c_ushort * 3)(_number(2), _number(2), _number(2)))
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(_number(8))
        ssl = sys.modules.get("ssl")
        if ssl is not None:
            ssl.RAND_add(os.urandom(64), 64.0)


def forget_kernel_randomness() -> None:
    """Empties the memory that libc keeps random bytes of the kernel in, ahead of their use.

    The kernel marks it (VM_DROPPABLE, `dp`) and may drop it at any time, so nobody minds; left
    alone, clones that start within the same minute would draw the same keys from it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for start, length in _droppable():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


def _droppable() -> list[tuple[int, int]]:
    """Address and length of each droppable mapping."""
    found = []
    start = end = 0
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if first == "VmFlags:":
                if "dp" in rest.split():
                    found.append((start, end - start))
            elif not first.endswith(":"):
                start, end = (int(address, 16) for address in first.split("-"))
    return found


def _kinds() -> set[type]:
    """The classes of generators, of those libraries that are loaded."""
    kinds: set[type] = set()
    for module, names in (
        ("random", ("Random",)),
        ("torch", ("Generator",)),
        ("numpy.random", ("RandomState", "Generator")),
    ):
        if module in sys.modules:
            kinds.update(getattr(sys.modules[module], name) for name in names)
    return kinds


def _defaults() -> list[Any]:
    """The generators behind module functions; they may be out of the collector's reach."""
    found = []
    if "random" in sys.modules:
        found.append(sys.modules["random"]._inst)
    if "torch" in sys.modules:
        found.append(sys.modules["torch"].default_generator)
    if "numpy.random" in sys.modules:
        found.append(sys.modules["numpy.random"].mtrand._rand)
    return found


def _reseed_numpy(generator: Any) -> None:
    """A fresh one of the same kind lends its state: not all kinds can be seeded again."""
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        bits.state = type(bits)(_number(16)).state
    else:
        # A RandomState also keeps half of a pair of normal numbers, which goes with its state.
        fresh = type(generator)(type(generator._bit_generator)(_number(16)))
        generator.set_state(fresh.get_state(legacy=False))


def _number(size: int) -> int:
    return int.from_bytes(os.urandom(size), "little")
