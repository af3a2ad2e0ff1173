"""What a process that was frozen takes for granted of its machine: instructions, kernel, libraries.

Code that has run has made choices that are in the image: glibc and torch have picked the functions
for the instructions that there were. So a machine must have all of those; it may have more. A
newer kernel keeps what an older one promised. Anything else must be the same.

Everything here is read in a few milliseconds, and nothing of torch is imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from coldframe.loader.errors import PlatformError
from coldframe.loader.packages import add_site_packages
from coldframe.snapshot.fields import Fields, Refusal
from coldframe.snapshot.gpus import Gpus
from coldframe.snapshot.libraries import Library

__all__ = ["Machine", "coldframe_build", "cpu_here", "cpu_of", "own_sources", "torch_version"]

# Of /proc/cpuinfo's flags, those that programs ask for before they use an instruction, and those of
# the registers that a signal's frame or CRIU's own files must hold. What the kernel alone uses,
# what it has made up, what only makes something faster, and mitigations are not among them.
_X86 = re.compile(
    "(?:sse|ssse|avx|amx_|fma|bmi|sha|sm3|sm4|vaes|vpclmul|3dnow|mmx).*"
    "|abm|adx|aes|apx|cldemote|clflush|clflushopt|clwb|clzero|cmov|cmpccxadd|cx16|cx8|enqcmd|f16c"
    "|fsgsbase|fxsr|gfni|hle|lahf_lm|lwp|monitorx|movbe|movdir64b|movdiri|msr_imm|ospke|pclmulqdq"
    "|pni|popcnt|prefetchi|ptwrite|raoint|rdpid|rdpru|rdrand|rdseed|rdtscp|rtm|serialize|tbm"
    "|user_shstk|waitpkg|xop|xsave|xsavec|xsaveopt"
)
# Of an arm64 machine all count that the kernel names, but these: its own event stream, and its own
# emulation of the identification registers.
_ARM_SYNTHETIC = frozenset({"cpuid", "evtstrm"})

_VERSION = re.compile(r"^__version__\s*(?::[^=]+)?=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_RELEASE = re.compile(r"(\d+)\.(\d+)")
_BLOCK = 8192
_PACKAGES = ("loader", "snapshot", "runtime")

_SAME = ("arch", "page_size", "device", "gpu", "driver", "glibc", "python", "executable", "torch")


class Machine(NamedTuple):
    """What an image needs, or what there is here.

    Attributes:
        arch: As uname has it.
        cpu_vendor: For people.
        cpu_features: The instruction sets that programs may use, sorted.
        kernel: Its version's first two numbers.
        glibc: Its name and version.
        python: Its version and cache tag.
        executable: The interpreter's real path.
        torch: Its version.
        coldframe: Our own version, and a hash of our sources.
        device: `cpu` or `cuda`.
        gpu: The names of the GPUs, with how many there are of each; None on the CPU, and where
            none can be seen.
        driver: Of their driver's module in the kernel, its version; None likewise. The library
            that goes with it is one of those that an image maps.
        page_size: Bytes.
        libraries: The files that the image maps; empty of a machine as such.
    """

    arch: str
    cpu_vendor: str
    cpu_features: tuple[str, ...]
    kernel: tuple[int, int]
    glibc: str
    python: str
    executable: str
    torch: str
    coldframe: str
    device: str
    gpu: str | None
    driver: str | None
    page_size: int
    libraries: tuple[Library, ...] = ()

    @staticmethod
    def here(*, device: str = "cpu", libraries: Iterable[str] = ()) -> Machine:
        """This machine, and what this interpreter would run.

        Args:
            device: `cpu` or `cuda`.
            libraries: Paths of files that an image maps (see `mapped_files`).

        Raises:
            PlatformError: torch is not installed.
            SnapshotError: One of the files is not there.
        """
        uname = os.uname()
        vendor, features = cpu_here()
        release = _RELEASE.match(uname.release)
        gpus = None if device == "cpu" else Gpus.here()
        return Machine(
            uname.machine,
            vendor,
            features,
            (int(release[1]), int(release[2])) if release else (0, 0),
            _glibc(),
            f"{sys.version.split()[0]} {sys.implementation.cache_tag}",
            os.path.realpath(sys.executable),
            torch_version(),
            coldframe_build(),
            device,
            gpus and gpus.name,
            gpus and gpus.driver,
            os.sysconf("SC_PAGE_SIZE"),
            Library.all_of(libraries),
        )

    def refusal(self, here: Machine) -> Refusal | None:
        """What this image needs and a machine does not have, if anything.

        The files that it maps are looked at last, and only those of this machine.
        """
        for name in _SAME:
            expected, got = getattr(self, name), getattr(here, name)
            if expected != got:
                return Refusal(name, _shown(expected), _shown(got))
        missing = sorted(set(self.cpu_features) - set(here.cpu_features))
        if missing:
            return Refusal(
                "cpu_features", ", ".join(missing), f"a CPU of {here.cpu_vendor} without"
            )
        if here.kernel < self.kernel:
            return Refusal("kernel", f"at least {_dotted(self.kernel)}", _dotted(here.kernel))
        if self.coldframe != here.coldframe:
            return Refusal("coldframe", self.coldframe, here.coldframe)
        for library in self.libraries:
            refusal = library.refusal()
            if refusal is not None:
                return refusal
        return None

    @staticmethod
    def from_json(value: object) -> Machine:
        """What `to_json` has made.

        Raises:
            SnapshotError: A field is wrong.
        """
        fields = Fields.of(value, "a machine")
        kernel = fields.integers("kernel")
        if len(kernel) != 2:
            raise fields.wrong("kernel", "two numbers", str(kernel))
        machine = Machine(
            fields.text("arch"),
            fields.text("cpu_vendor"),
            fields.texts("cpu_features"),
            (kernel[0], kernel[1]),
            fields.text("glibc"),
            fields.text("python"),
            fields.text("executable"),
            fields.text("torch"),
            fields.text("coldframe"),
            fields.text("device"),
            None if fields.absent("gpu") else fields.text("gpu"),
            None if fields.absent("driver") else fields.text("driver"),
            fields.integer("page_size", 1),
            tuple(map(Library.from_json, fields.children("libraries"))),
        )
        fields.end()
        return machine

    def to_json(self) -> dict[str, Any]:
        """The machine as JSON values."""
        libraries = [library.to_json() for library in self.libraries]
        lists = {"cpu_features": [*self.cpu_features], "kernel": [*self.kernel]}
        return {**self._asdict(), **lists, "libraries": libraries}


def cpu_here() -> tuple[str, tuple[str, ...]]:
    """This machine's; see `cpu_of`."""
    return cpu_of(_cpuinfo())


def cpu_of(block: str) -> tuple[str, tuple[str, ...]]:
    """A CPU's vendor and those of its features that programs use.

    Args:
        block: What /proc/cpuinfo says of it.
    """
    lines = (line.partition(":") for line in block.splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    vendor = said.get("vendor_id") or said.get("CPU implementer") or "unknown"
    if "Features" in said:
        found = set(said["Features"].split()) - _ARM_SYNTHETIC
    else:
        flags = set(said.get("flags", "").split())
        found = {flag for flag in flags if _X86.fullmatch(flag)}
    return vendor, tuple(sorted(found))


def _cpuinfo() -> str:
    """What /proc/cpuinfo says of the first CPU; to ask about all of them interrupts each."""
    text = b""
    fd = os.open("/proc/cpuinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while b"\n\n" not in text and (block := os.read(fd, _BLOCK)):
            text += block
    finally:
        os.close(fd)
    return text.decode("ascii", "replace").partition("\n\n")[0]


def _glibc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    except (ValueError, OSError):
        return "unknown"  # another C library, which does not say what it is


def torch_version() -> str:
    """The version of the torch that this interpreter would import; it is not imported for that.

    Raises:
        PlatformError: There is none.
    """
    add_site_packages()
    for finder in sys.meta_path:
        spec = finder.find_spec("torch", None) if hasattr(finder, "find_spec") else None
        for place in (spec and spec.submodule_search_locations) or ():
            try:
                with open(os.path.join(place, "version.py"), encoding="utf-8") as file:
                    version = _VERSION.search(file.read())
            except OSError:
                continue
            if version is not None:
                return version[1]
    raise PlatformError("torch is not installed", hint="Run: pip install torch")


def coldframe_build() -> str:
    """Our own version, and a hash of our sources."""
    return f"{_own_version()} {own_sources()}"


def _own_version() -> str:
    """What the installed package is called; nothing of importlib.metadata, which takes its time."""
    for place in sys.path:
        try:
            names = os.listdir(place or ".")
        except OSError:
            continue
        for name in names:
            if name.startswith("coldframe-") and name.endswith(".dist-info"):
                return name.removeprefix("coldframe-").removesuffix(".dist-info")
    return "uninstalled"


def own_sources() -> str:
    """A hash of the names and contents of what a worker may have imported of ours.

    Two checkouts of one version must not share an image. Times would be cheaper to look at, but
    each installation has others.
    """
    import hashlib

    digest = hashlib.sha256()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for package in _PACKAGES:
        for path in _sources(os.path.join(root, package)):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                content = os.read(fd, os.fstat(fd).st_size + 1)
            finally:
                os.close(fd)
            digest.update(f"{path.removeprefix(root)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _sources(directory: str) -> list[str]:
    found, folders = [], []
    with os.scandir(directory) as items:
        for item in items:
            if item.name.endswith(".py"):
                found.append(item.path)
            elif item.name != "__pycache__" and item.is_dir(follow_symlinks=False):
                folders.append(item.path)
    for folder in folders:
        found += _sources(folder)
    return sorted(found)


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
