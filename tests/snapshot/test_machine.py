from __future__ import annotations

import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot import machine
from coldframe.snapshot.libraries import Library, mapped_files
from coldframe.snapshot.machine import Machine, cpu_of
from tests.snapshot.images import MACHINE
from tests.support import importable

ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes sve2 cpuid bf16
CPU implementer\t: 0x41
"""
X86 = """processor\t: 0
vendor_id\t: GenuineIntel
flags\t\t: fpu vme sse sse4_2 avx512_fp16 amx_tile constant_tsc nopl ibrs pti bmi2 erms xsave
bugs\t\t: spectre_v1 sse_of_a_kind
"""


def test_here_agrees_with_what_python_and_torch_say() -> None:
    here = Machine.here()
    code = "import torch; print(torch.__version__)"
    torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert here.torch == torch.stdout.strip()
    assert here.python.startswith(platform.python_version() + " ")
    assert here.glibc == " ".join(platform.libc_ver())
    assert here.arch == platform.machine()
    assert here.page_size == mmap.PAGESIZE
    assert os.path.samefile(here.executable, sys.executable)
    assert here.refusal(Machine.here()) is None
    assert Machine.from_json(here.to_json()) == here


def test_here_imports_no_torch_and_works_in_a_bare_interpreter(tmp_path: Path) -> None:
    code = (
        "import sys; sys.coldframe_packages = sys.argv[1].split(':')\n"
        "from coldframe.loader.packages import add_site_packages; add_site_packages()\n"
        "from coldframe.snapshot.machine import Machine\n"
        "here = Machine.here(); assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'dataclasses' not in sys.modules\n"
        "print(here.torch)"
    )
    paths = [path for path in sys.path if "site-packages" in path]
    found = subprocess.run(
        [sys.executable, "-S", "-c", code, ":".join(paths)],
        env={**os.environ, "PYTHONPATH": importable(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.stderr == ""
    assert found.stdout.strip() == Machine.here().torch


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arch", "aarch64"),
        ("page_size", 65536),
        ("device", "cuda"),
        ("gpu", "NVIDIA H200"),
        ("driver", "580.65"),
        ("glibc", "glibc 2.39"),
        ("python", "3.12.1 cpython-312"),
        ("executable", "/opt/python"),
        ("torch", "2.14.0+cpu"),
        ("coldframe", "0.1.0 fedcba9876543210"),
    ],
)
def test_what_must_be_the_same_is_named_where_it_is_not(field: str, value: object) -> None:
    refusal = MACHINE.refusal(MACHINE._replace(**{field: value}))
    assert refusal is not None
    assert refusal.field == field
    assert refusal.expected == (
        "none" if field in ("gpu", "driver") else str(getattr(MACHINE, field))
    )
    assert refusal.got == str(value)
    assert str(refusal) == f"{field}: expected {refusal.expected}, got {value}"


def test_more_instructions_are_taken_and_fewer_are_not() -> None:
    more = MACHINE._replace(cpu_features=("avx", "avx2", "avx512f", "fma"))
    assert MACHINE.refusal(more) is None
    refusal = more.refusal(MACHINE)
    assert refusal is not None
    assert (refusal.field, refusal.expected) == ("cpu_features", "avx512f")


@pytest.mark.parametrize(
    ("kernel", "fits"),
    [((6, 1), True), ((6, 2), True), ((7, 0), True), ((6, 0), False), ((5, 19), False)],
)
def test_the_kernel_is_a_floor(kernel: tuple[int, int], fits: bool) -> None:
    refusal = MACHINE.refusal(MACHINE._replace(kernel=kernel))
    assert (refusal is None) == fits
    assert fits or (refusal is not None and refusal.field == "kernel")


def test_only_what_programs_use_counts_of_a_cpu() -> None:
    assert cpu_of(X86) == (
        "GenuineIntel",
        ("amx_tile", "avx512_fp16", "bmi2", "sse", "sse4_2", "xsave"),
    )
    assert cpu_of(ARM) == ("0x41", ("aes", "asimd", "bf16", "fp", "sve2"))


def test_features_of_this_cpu_are_known_to_torch_too() -> None:
    import torch

    known = {"AVX2": "avx2", "AVX512": "avx512f"}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in known:
        assert known[capability] in Machine.here().cpu_features


def test_other_sources_are_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("loader", "snapshot", "runtime"):
        source = Path(machine.__file__).parents[1] / package
        shutil.copytree(source, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = Machine.here()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "snapshot" / "machine.py"))
    assert Machine.here() == before  # the same contents in another place
    changed = tmp_path / "runtime" / "engine" / "prefill.py"
    times = os.stat(changed).st_mtime_ns
    changed.write_bytes(changed.read_bytes().replace(b"import", b"Import", 1))
    os.utime(changed, ns=(times, times))
    refusal = before.refusal(Machine.here())
    assert refusal is not None
    assert refusal.field == "coldframe"


# Files that are mapped


@pytest.fixture
def library(tmp_path: Path) -> Path:
    found = next(
        path for path in mapped_files(os.getpid()) if "/libc.so" in path or "libc-" in path
    )
    return Path(shutil.copy2(found, tmp_path / "libcopy.so"))


def test_mapped_files_are_those_that_psutil_sees() -> None:
    import psutil

    expected = {
        entry.path for entry in psutil.Process().memory_maps() if os.path.isfile(entry.path)
    }
    assert {path for path in mapped_files(os.getpid()) if os.path.isfile(path)} == expected
    assert Machine.here(libraries=mapped_files(os.getpid())).refusal(Machine.here()) is None


def test_the_build_id_is_the_one_that_file_finds(library: Path) -> None:
    identity = Library.of(str(library)).identity
    assert identity.startswith("build-id:")
    assert bytes.fromhex(identity.removeprefix("build-id:")) in library.read_bytes()
    if tool := shutil.which("readelf"):
        said = subprocess.run([tool, "-n", library], capture_output=True, text=True, check=True)
        assert f"Build ID: {identity.removeprefix('build-id:')}" in said.stdout


def test_a_file_without_build_id_is_known_by_its_content(tmp_path: Path) -> None:
    for content in (b"", b"\x7fELF", b"text", b"\x7fELF\x02\x01" + bytes(100)):
        (tmp_path / "file").write_bytes(content)
        expected = f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert Library.of(str(tmp_path / "file")).identity == expected


def test_a_library_installed_again_is_the_same(library: Path) -> None:
    known = Library.of(str(library))
    os.utime(library, ns=(1, 1))
    assert known.refusal() is None


def test_a_library_that_was_exchanged_is_named(library: Path) -> None:
    known = MACHINE._replace(libraries=(Library.of(str(library)),))
    assert known.refusal(MACHINE) is None
    identity = known.libraries[0].identity.removeprefix("build-id:")
    content = library.read_bytes()
    library.write_bytes(content.replace(bytes.fromhex(identity), bytes(len(identity) // 2)))
    refusal = known.refusal(MACHINE)
    assert refusal is not None
    assert refusal.field == f"library {library}"
    assert refusal.expected == known.libraries[0].identity
    library.write_bytes(content + b"!")
    refusal = known.refusal(MACHINE)
    assert refusal is not None
    assert refusal.got == f"{len(content) + 1} bytes"
    library.unlink()
    refusal = known.refusal(MACHINE)
    assert refusal is not None
    assert refusal.got == "No such file or directory"


def test_a_deleted_library_cannot_be_in_an_image(library: Path) -> None:
    code = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "held = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\n"
        "os.unlink(sys.argv[1]); print('mapped', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, library], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        with pytest.raises(SnapshotError, match="not there any more") as raised:
            mapped_files(process.pid)
        assert raised.value.where == str(library)
        process.communicate()
