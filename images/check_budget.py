#!/usr/bin/env python3
"""Holds an image, or the wheels that it will be made of, against its budget (budget.toml).

    images/check_budget.py cpu ROOT            its root file system, as `buildah mount` shows it
    images/check_budget.py cpu --wheels DIR    wheels as `pip download` leaves them, not trimmed yet
    images/check_budget.py cuda --sizes        what its wheels hold, by sizes/cuda.txt

A distribution's size is that of its files with their byte code. What it would take as its wheel
installs it is in its RECORD, also where files have been left out since: that is what "torch and its
own needs" are summed from. Needs nothing but Python 3.11.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import wheel_sizes
from wheel_sizes import normalised

HERE = Path(__file__).parent
MB = 1e6
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==")


@dataclass(frozen=True, slots=True)
class Part:
    """A distribution as it lies in an image, or in its wheel.

    Args:
        name: Its name, normalised.
        size: Bytes that it takes.
        whole: Bytes that its wheel installs.
        needs: Names of what it asks for, extras left out.
    """

    name: str
    size: int
    whole: int
    needs: tuple[str, ...]


def installed(root: Path) -> list[Part]:
    """The distributions of an image's root file system."""
    (site,) = root.glob("opt/coldframe/lib/python3*/site-packages")
    tag = site.parent.name.removeprefix("python").replace(".", "")
    return [_part(found, tag) for found in distributions(path=[str(site)])]


def _part(found: Distribution, tag: str) -> Part:
    size = whole = 0
    for file in found.files or ():
        whole += file.size or 0
        path = Path(os.path.normpath(str(found.locate_file(file))))
        for there in (path, *_byte_code(path, tag)):
            if there.is_file() and not there.is_symlink():
                size += there.stat().st_size
    needs = tuple(_needs(found.requires or ()))
    return Part(normalised(found.metadata["Name"]), size, whole, needs)


def _byte_code(path: Path, tag: str) -> Iterator[Path]:
    if path.suffix == ".py":
        yield path.parent / "__pycache__" / f"{path.stem}.cpython-{tag}.pyc"


def _needs(requirements: Sequence[str]) -> Iterator[str]:
    for requirement in requirements:
        if "extra ==" not in requirement:
            found = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert found is not None, requirement
            yield normalised(found[0])


def wheels(folder: Path) -> list[Part]:
    """The distributions whose wheels lie in a folder."""
    found = []
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            size = sum(info.file_size for info in wheel.infolist())
            (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            lines = wheel.read(metadata).decode().splitlines()
        needs = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-D")]
        name = normalised(path.name.split("-")[0])
        found.append(Part(name, size, size, tuple(_needs(needs))))
    return found


def expected(image: str) -> list[Part]:
    """The distributions of an image that has not been built, by what their wheels hold."""
    return [
        Part(one.name, one.kept + int(one.python * wheel_sizes.BYTE_CODE), one.files, ())
        for one in wheel_sizes.read(image)
    ]


def closure(parts: Sequence[Part], of: str) -> list[Part]:
    """A distribution and all that it needs, as far as it is there."""
    known = {part.name: part for part in parts}
    wanted, found = [of], dict[str, Part]()
    while wanted:
        name = wanted.pop()
        if name in known and name not in found:
            found[name] = known[name]
            wanted += known[name].needs
    return list(found.values())


def whole_tree(root: Path) -> int:
    """Bytes of all files below a folder; each is counted once, however many names it has."""
    seen, total = set[tuple[int, int]](), 0
    for folder, folders, files in os.walk(root):
        if folder == str(root):
            folders[:] = [name for name in folders if name not in ("proc", "sys", "dev")]
        for name in files:
            status = os.lstat(os.path.join(folder, name))
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_size
    return total


def layers_of(budget: Mapping[str, Any], image: str) -> dict[str, Any]:
    """An image's layers: those of the one below it, and its own."""
    below = budget[image].get("below")
    return {**(layers_of(budget, below) if below else {}), **budget[image]["layers"]}


def layer_of(name: str, layers: Mapping[str, Any]) -> str | None:
    """The layer that a distribution is in: the one that names it, else the one with its list."""
    rules = [(layer, rule) for layer, rule in layers.items() if isinstance(rule, dict)]
    for layer, rule in rules:
        if name in rule.get("names", ()):
            return layer
    for layer, rule in rules:
        if any(name in listed(HERE / file) for file in rule.get("lists", ())):
            return layer
    return None


def listed(file: Path) -> set[str]:
    """The distributions that a file of pinned versions names."""
    found = (_PINNED.match(line) for line in file.read_text().splitlines())
    return {normalised(match[1]) for match in found if match}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what layers take; returns 1 where that is more, or something else, than it may be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", help="which one, as in budget.toml")
    parser.add_argument("root", type=Path, nargs="?", help="its root file system")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels in its place")
    parser.add_argument("--sizes", action="store_true", help="or what is known of its wheels")
    args = parser.parse_args(argv)
    budget = tomllib.loads((HERE / "budget.toml").read_text())
    given = [args.root is not None, args.wheels is not None, args.sizes]
    if args.image not in budget or sum(given) != 1:
        parser.error(f"one of {', '.join(budget)}, and ROOT, --wheels DIR or --sizes")
    layers = layers_of(budget, args.image)
    if args.root is not None:
        parts = installed(args.root)
    else:
        parts = expected(args.image) if args.sizes else wheels(args.wheels)
    sizes, wrong = dict.fromkeys(layers, 0), list[str]()
    for part in parts:
        layer = layer_of(part.name, layers)
        if layer is None:
            wrong.append(f"{part.name}: no layer of {args.image} has it")
        else:
            sizes[layer] += part.size
    if args.root is not None:
        sizes["system"] = whole_tree(args.root) - sum(sizes.values())
    for layer, size in sizes.items():
        limit = layers[layer]["limit"] if isinstance(layers[layer], dict) else layers[layer]
        print(f"{layer:<8} {size / MB:>8.1f} MB of {limit:>5} MB")
        if size > limit * MB:
            wrong.append(f"{layer}: {size / MB:.1f} MB are more than {limit} MB")
    total = sum(sizes.values())
    print(f"{'all':<8} {total / MB:>8.1f} MB", end="")
    own = sum(part.whole for part in closure(parts, "torch"))
    if not args.sizes:  # which do not say who needs whom
        print(f"; torch and its own needs {own / MB:.1f} MB", end="")
    if args.root is not None and own:
        print(f", {total / own:.3f} of that", end="")
        ratio = budget[args.image].get("torch_ratio")
        if ratio is not None and total > ratio * own:
            wrong.append(f"{total / own:.3f} of torch and its own needs, more than {ratio}")
    print()
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
