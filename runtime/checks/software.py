"""What is installed: versions, torch, a compiler. Nothing of torch is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from coldframe.loader.errors import PlatformError
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.snapshot.machine import torch_version

__all__ = ["compiler", "torch", "versions"]

_SOON_S = 10.0
_PACKAGES = ("coldframe", "torch", "safetensors", "tokenizers", "transformers", "vllm", "boto3")


def torch(case: Case) -> Finding:
    found = torch_version()
    return Finding("torch", found, {"version": found}, needed=True)


def versions(case: Case) -> Finding:
    """Of what a start's speed and an image's fit depend on."""
    facts: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    there = ", ".join(f"{name} {found}" for name, found in facts.items() if found is not None)
    return Finding("versions", there, facts)


def compiler(case: Case) -> Finding:
    """Of C++: what compiles decode steps, when an image is made."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise PlatformError(
            "there is no C++ compiler: decode steps stay eager",
            expected=name,
            hint="Install one (make system), or name one in CXX; nothing else needs it.",
        )
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=_SOON_S
        )
        first = next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else ""
    except subprocess.TimeoutExpired:
        first = ""
    if not first:
        raise PlatformError(
            "the C++ compiler does not run: decode steps stay eager",
            where=path,
            hint="Install another one (make system), or name one in CXX; nothing else needs it.",
        )
    facts = {"path": path, "version": first}
    return Finding("compiler", f"decode steps can be compiled: {first}", facts)
