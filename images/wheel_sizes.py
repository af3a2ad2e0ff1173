#!/usr/bin/env python3
"""What the wheels of an image install, by their tables of contents: none of them is fetched.

    images/wheel_sizes.py cuda        asks pip where those of its lists are; writes sizes/cuda.txt

A wheel is a zip file, and ends with its table of contents: a range of some 100 KB of a wheel of a
gigabyte. Where wheels lie is pip's to say, in a dry run that fetches nothing more either (pip 26 or
later). The index is PyPI, which has torch's build for CUDA; what pip.conf says is set aside.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIZES = HERE / "sizes"
SITE = "site-packages"
BYTE_CODE = 1.3
"""Bytes of byte code to one of source: 1.29 in the CPU image, whose tests check it."""
_READ_BYTES = 1 << 18
_WAIT_S = 60
_AT_ONCE = 4
_PIP = 26
_HEADER = """\
# What the wheels of images/{image}.Dockerfile install, on x86-64 with Python 3.11; made by
# images/wheel_sizes.py {image}.
# Bytes of the wheel, of its files, of those that install.sh keeps, and of the Python among these:
# byte code, 1.3 times these, comes on top.
"""
_WITHOUT_TESTS = ("mpmath", "networkx", "psutil", "sympy")
_SERVICES = ("s3", "signin", "sso", "sso-oidc", "sts")


@dataclass(frozen=True, slots=True)
class Wheel:
    """What a wheel installs.

    Args:
        name: Of its distribution, normalised.
        version: Of it.
        wheel: Its own bytes, compressed.
        files: Bytes of all of its files.
        kept: Of those that the image has.
        python: Of the Python sources among them.
    """

    name: str
    version: str
    wheel: int
    files: int
    kept: int
    python: int


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def kept(path: str) -> bool:
    """Whether install.sh leaves a file in an image.

    Args:
        path: Below the prefix, `site-packages` for where packages are: `site-packages/torch/a.py`.
    """
    place, *inside = path.split("/")
    if path.endswith((".a", ".pyi")):
        return False
    if place != SITE:
        return place not in ("bin", "share") or path == "bin/coldframe"
    match inside:
        case ["torch", "bin", *_, program]:
            return program == "torch_shm_manager"
        case ["torch", "test" | "share" | "include", _, *_]:
            return False
        case ["botocore", "data", service, _, *_]:
            return service in _SERVICES
        case [package, *folders, _] if package in _WITHOUT_TESTS:
            return "tests" not in folders
    return True


def installed_as(entry: str) -> str:
    """Where pip puts a file of a wheel (PEP 427), as `kept` takes it."""
    folder, _, rest = entry.partition("/")
    if not folder.endswith(".data"):
        return f"{SITE}/{entry}"
    scheme, _, path = rest.partition("/")
    places = {"purelib": f"{SITE}/", "platlib": f"{SITE}/", "scripts": "bin/", "data": ""}
    return places.get(scheme, f"{scheme}/") + path


def measured(name: str, version: str, url: str) -> Wheel:
    """A wheel, by its table of contents.

    Args:
        name: Its distribution's.
        version: Of that.
        url: Where it lies.
    """
    remote = Ranges(url)
    with zipfile.ZipFile(io.BufferedReader(remote, _READ_BYTES)) as archive:
        entries = [(installed_as(e.filename), e.file_size) for e in archive.infolist()]
    there = [(path, size) for path, size in entries if kept(path)]
    return Wheel(
        normalised(name),
        version,
        remote.size,
        sum(size for _, size in entries),
        sum(size for _, size in there),
        sum(size for path, size in there if path.endswith(".py")),
    )


class Ranges(io.RawIOBase):
    """A file behind a URL, of which only what is read is fetched.

    Args:
        url: Where it is; its server answers ranges.

    Raises:
        OSError: It does not.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._at = 0
        self.size = self._fetch(0, 1)[1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._fetch(self._at, count)[0]
        self._at += count
        return count

    def _fetch(self, start: int, count: int) -> tuple[bytes, int]:
        """So many bytes from there, and the size of the whole."""
        wanted = {"Range": f"bytes={start}-{start + count - 1}"}
        request = urllib.request.Request(self._url, headers=wanted)
        with urllib.request.urlopen(request, timeout=_WAIT_S) as answer:
            said = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if said is None:
                raise OSError(f"{self._url}: its server answers no ranges")
            return answer.read(), int(said[1])


def asked_of_pip(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What pip would install, as its report has it: `metadata`, and `url` of the wheel.

    Args:
        arguments: Of `pip install`.
    """
    pip = [sys.executable, "-m", "pip"]
    said = subprocess.run([*pip, "--version"], capture_output=True, text=True, check=True).stdout
    if int(said.split()[1].partition(".")[0]) < _PIP:
        sys.exit(f"this pip would fetch whole wheels, {_PIP} or later does not: pip install -U pip")
    dry = ["install", "--dry-run", "--ignore-installed", "--quiet", "--no-cache-dir"]
    lazy = ["--only-binary=:all:", "--use-feature=fast-deps"]
    done = subprocess.run(
        [*pip, *dry, *lazy, "--report", "-", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""},
    )
    found = json.loads(done.stdout)["install"]
    return [{**one["metadata"], "url": one["download_info"]["url"]} for one in found]


def requirements(image: str) -> list[str]:
    """What an image is made of, as pip is told: its lists, and what its Dockerfile itself names."""
    budget = tomllib.loads((HERE / "budget.toml").read_text())
    rules = [rule for rule in budget[image]["layers"].values() if isinstance(rule, dict)]
    lists = sorted({name for rule in rules for name in rule.get("lists", ())})
    named = re.findall(
        r"^ARG (TORCH|VLLM)=(\S+)$", (HERE / f"{image}.Dockerfile").read_text(), re.M
    )
    of_lists = [word for name in lists for word in ("-r", str(HERE / name))]
    return ["--no-deps", *of_lists, *(f"{name.lower()}=={version}" for name, version in named)]


def read(image: str) -> list[Wheel]:
    """What has been written of an image's wheels."""
    rows = (line.split() for line in (SIZES / f"{image}.txt").read_text().splitlines())
    return [Wheel(row[0], row[1], *map(int, row[2:])) for row in rows if row and row[0] != "#"]


def write(image: str, found: Iterable[Wheel]) -> None:
    """Writes it, a wheel a line."""
    rows = [tuple(field.name for field in fields(Wheel))]
    rows += [tuple(map(str, astuple(wheel))) for wheel in sorted(found, key=lambda w: w.name)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        words = [
            w.ljust(n) if i < 2 else w.rjust(n)
            for i, (w, n) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" ".join(words))
    lines[0] = f"# {lines[0]}"
    SIZES.mkdir(exist_ok=True)
    (SIZES / f"{image}.txt").write_text(_HEADER.format(image=image) + "\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="which one, as in budget.toml")
    args = parser.parse_args(argv)
    wheels = asked_of_pip(requirements(args.image))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda w: measured(w["name"], w["version"], w["url"]), wheels))
    write(args.image, found)
    print(f"{len(found)} wheels, {sum(wheel.kept for wheel in found) / 1e6:.0f} MB", end="")
    print(f" of {sum(wheel.files for wheel in found) / 1e6:.0f} MB are kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())
