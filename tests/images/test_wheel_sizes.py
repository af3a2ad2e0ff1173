"""What is known of the wheels of images that nothing builds here, and how it comes to be known."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from images.wheel_sizes import BYTE_CODE, Wheel, installed_as, kept, measured, read, requirements
from tests.images.building import IMAGES, REPOSITORY

MEASURED = ("cuda", "vllm")
MARGIN = 1.05
MB = 1_000_000
BUDGET = tomllib.loads((IMAGES / "budget.toml").read_text())


def rules(image: str) -> dict[str, Any]:
    """The layers of an image that are made of distributions, and are measured by their wheels."""
    found = {name: rule for name, rule in BUDGET[image]["layers"].items() if isinstance(rule, dict)}
    return {name: rule for name, rule in found.items() if name != "code"}


def pinned(image: str) -> dict[str, str]:
    """The distributions that its Dockerfile installs, and their versions."""
    found: dict[str, str] = {}
    words = iter(requirements(image))
    for word in words:
        if word == "-r":
            lines = Path(next(words)).read_text().splitlines()
            pins = [line for line in lines if line and not line.startswith("#")]
        else:
            pins = [word] if "==" in word else []
        for pin in pins:
            name, _, version = pin.partition("==")
            name = re.sub(r"[-_.]+", "-", name).lower()
            assert name not in found, f"{name} is in two lists of {image}"
            found[name] = version
    return found


def summed(image: str) -> dict[str, float]:
    """What its layers take, in MB, as the check of the budget has it."""
    words = [sys.executable, IMAGES / "check_budget.py", image, "--sizes"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}


@pytest.mark.parametrize("image", MEASURED)
def test_what_was_measured_is_what_is_installed(image: str) -> None:
    assert {wheel.name: wheel.version for wheel in read(image)} == pinned(image)
    for wheel in read(image):
        assert wheel.wheel > 0
        assert 0 <= wheel.python <= wheel.kept <= wheel.files, wheel


@pytest.mark.parametrize("image", MEASURED)
def test_they_are_within_its_budget(image: str) -> None:
    taken = summed(image)
    for name, rule in rules(image).items():
        # A limit is what was measured and a margin, and grants nothing besides.
        assert taken[name] <= rule["limit"] <= math.ceil(taken[name] * MARGIN / 5) * 5, name
    measured_mb = sum(wheel.kept + wheel.python * BYTE_CODE for wheel in read(image)) / MB
    assert taken["all"] == pytest.approx(measured_mb, abs=1)


def test_the_guide_says_the_same() -> None:
    text = (REPOSITORY / "docs" / "images.md").read_text()
    rows = {
        name: [cell.strip().replace(",", "") for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| ([^|]+) \|([^|]*\|[^|]*)\|$", text, re.M)
    }
    for column, image in enumerate(MEASURED):
        assert rows["layer, MB"][column] == image
        taken = summed(image)
        for name, layer in (
            ("cuDNN", "cudnn"),
            ("NVIDIA's other libraries", "nvidia"),
            ("torch", "torch"),
            ("Triton", "triton"),
        ):
            said = rows[name][column]
            assert said == (f"{taken[layer]:.0f}" if layer in taken else "")
        assert rows["other wheels, coldframe"][column].startswith(f"{taken['wheels']:.0f}")
    needs, engine = (f"{summed('vllm')[layer]:.0f}" for layer in ("vllm", "engine"))
    assert rows["vLLM's needs, vLLM"] == ["", f"{needs} {engine}"]


@pytest.mark.parametrize("image", MEASURED)
def test_no_rule_is_left_over(image: str) -> None:
    """Each distribution is in one list, or named by one layer; and what is named is there."""
    there = pinned(image).keys()  # which looks for those in two lists
    named = [name for rule in rules(image).values() for name in rule.get("names", ())]
    assert len(set(named)) == len(named)
    assert set(named) <= there


@pytest.mark.parametrize(
    ("entry", "there"),
    [
        ("torch/nn/functional.py", True),
        ("torch/nn/functional.pyi", False),
        ("torch/include/torch/torch.h", False),
        ("torch/share/cmake/Torch/TorchConfig.cmake", False),
        ("torch/bin/torch_shm_manager", True),
        ("torch/bin/protoc", False),
        ("torch/lib/libtorch.so", True),
        ("triton/backends/nvidia/bin/ptxas", True),
        ("nvidia/cu13/lib/libcudart_static.a", False),
        ("sympy/core/tests/test_expr.py", False),
        ("sympy/testing/tests.py", True),
        ("numpy/tests/test_all.py", True),
        ("botocore/data/s3/2006-03-01/service-2.json.gz", True),
        ("botocore/data/ec2/2016-11-15/service-2.json.gz", False),
        ("botocore/data/endpoints.json", True),
        ("torch-2.data/scripts/torchrun", False),
        ("torch-2.data/data/share/man/man1/x.1", False),
        ("torch-2.data/data/etc/x.conf", True),
        ("torch-2.data/purelib/torch/x.py", True),
        ("coldframe-1.data/scripts/coldframe", True),
    ],
)
def test_what_an_image_keeps_of_a_wheel(entry: str, there: bool) -> None:
    # That these are install.sh's rules is checked with the image that is built.
    assert kept(installed_as(entry)) == there


class Served(BaseHTTPRequestHandler):
    """One file, whole or in ranges."""

    data: ClassVar[bytes]
    ranges: ClassVar[bool]
    sent: ClassVar[int]

    def do_GET(self) -> None:
        part, status = self.data, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.ranges:
            first, last = int(asked[1]), int(asked[2])
            part, status = self.data[first : last + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.data)}")
        self.end_headers()
        type(self).sent += len(part)
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(data: bytes, *, ranges: bool = True) -> Iterator[tuple[str, type[Served]]]:
    """A server of a file, while the context lasts."""
    handler = type("Handler", (Served,), {"data": data, "ranges": ranges, "sent": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a-1-py3-none-any.whl", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    """One of 8 MB that are not compressed, as libraries are hardly."""
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A/lib.so", bytes(8 * MB))
        archive.writestr("A/lib.a", bytes(MB))
        archive.writestr("A/code.py", b"#" * 5000)
        archive.writestr("A-1.dist-info/METADATA", b"Name: A\n")
    return path.read_bytes()


def test_a_wheel_is_measured_by_its_end(wheel: bytes) -> None:
    with served(wheel) as (url, server):
        found = measured("A.b", "1", url)
    assert found == Wheel("a-b", "1", len(wheel), 9 * MB + 5008, 8 * MB + 5008, 5000)
    assert server.sent < MB


def test_a_server_without_ranges_is_refused(wheel: bytes) -> None:
    with served(wheel, ranges=False) as (url, _), pytest.raises(OSError, match="no ranges"):
        measured("a", "1", url)
