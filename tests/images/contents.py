"""What is in an image: its packages, what they ask for, and their byte code."""

from __future__ import annotations

from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.images.conftest import Image

__all__ = ["code_of", "compiled", "nobodys", "requirements_unmet", "site_of", "tag_of"]

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}


def site_of(image: Image) -> Path:
    """Where its packages are."""
    (site,) = image.root.glob("opt/coldframe/lib/python3*/site-packages")
    return site


def tag_of(image: Image) -> str:
    """How its Python names byte code."""
    return f"cpython-{site_of(image).parent.name.removeprefix('python').replace('.', '')}"


def code_of(source: Path, tag: str) -> bytes | None:
    """A source's byte code; None where there is none."""
    path = source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc"
    return path.read_bytes() if path.is_file() else None


def compiled(place: Path, tag: str) -> int:
    """Makes sure of the byte code of all that is in a folder, and returns how many modules that is.

    Args:
        place: Nobody imports tests in it, and what others have put there is not looked at.
        tag: How byte code is named.
    """
    sources = [
        path for path in place.rglob("*.py") if not _LEFT_OUT & {*path.relative_to(place).parts}
    ]
    without = []
    for source in sources:
        data = code_of(source, tag)
        if data is None:
            without.append(source)
            continue
        assert int.from_bytes(data[4:8], "little") == 1, source  # by hash, unchecked: PEP 552
    for source in without:
        with pytest.raises(SyntaxError):
            compile(source.read_bytes(), source, "exec")
    return len(sources) - len(without)


def _distributions(site: Path) -> dict[str, Distribution]:
    return {canonicalize_name(one.metadata["Name"]): one for one in distributions(path=[str(site)])}


def nobodys(site: Path, *roots: tuple[str, str]) -> set[str]:
    """The distributions that nobody needs, by what they say themselves.

    Args:
        site: Where they are.
        roots: What is needed for its own sake, each with an extra of its.
    """
    found = _distributions(site)
    wanted, needed = list(roots), set[tuple[str, str]]()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in needed or name not in found:
            continue
        needed.add((name, extra))
        for text in found[name].requires or ():
            asked = Requirement(text)
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                plain = canonicalize_name(asked.name)
                wanted += [(plain, each) for each in ("", *asked.extras)]
    return set(found) - {name for name, _ in needed}


def requirements_unmet(site: Path) -> set[str]:
    """What distributions ask for and do not find beside them."""
    found = _distributions(site)
    missing: set[str] = set()
    for name, distribution in found.items():
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            there = found.get(canonicalize_name(requirement.name))
            if there is None or not requirement.specifier.contains(there.version, prereleases=True):
                missing.add(f"{name} wants {requirement}")
    return missing
