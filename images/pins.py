#!/usr/bin/env python3
"""Makes the lists anew of what torch and vLLM ask for, as pip resolves it today.

    images/pins.py        then images/wheel_sizes.py cuda, and vllm: `make images-sizes`

Written are nvidia.txt, triton.txt, vllm.txt and wheels-vllm.txt, each below the comment that it has
already. What our own tests run with stays as it is, in torch.txt and constraints.txt.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from wheel_sizes import HERE, asked_of_pip, normalised

OURS = ("awscrt", "boto3", "lz4", "xxhash")
"""What coldframe has, that vLLM does not bring."""
DRIVER = "cuda-bindings>=13"
LEFT_OUT = ("flashinfer-python",)
"""What vLLM asks for, and does not use in an image without nvcc and ninja."""


def main() -> int:
    text = (HERE / "vllm.Dockerfile").read_text()
    named = dict(re.findall(r"^ARG (TORCH|VLLM)=(\S+)$", text, re.M))
    roots = [f"torch=={named['TORCH']}", f"vllm=={named['VLLM']}"]
    constraints = HERE / "torch.txt", HERE.parent / "constraints.txt"
    pins = [line for line in constraints[1].read_text().splitlines() if _is_ours(line)]
    words = ["-c", str(constraints[0]), *roots, DRIVER, *pins]
    found = {normalised(one["name"]): one for one in asked_of_pip(words)}
    torch, vllm = needed(found, "torch"), needed(found, "vllm")
    own = {normalised(name) for name in re.findall(r"^(\S+)==", constraints[0].read_text(), re.M)}
    bound = {name for name in torch if name.startswith(("nvidia-", "cuda-toolkit"))}
    lists = {
        "nvidia.txt": bound,
        "triton.txt": {"triton"},
        "vllm.txt": vllm - bound - own - {"triton", "torch", "vllm"},
        "wheels-vllm.txt": set().union(*(needed(found, name) for name in OURS)) - vllm - own,
    }
    for name, names in lists.items():
        _write(HERE / name, [found[one] for one in names])
    return 0


def _is_ours(pin: str) -> bool:
    return pin.partition("==")[0] in (*OURS, "botocore")


def needed(found: dict[str, Any], root: str) -> set[str]:
    """The names of what a distribution needs, itself among them, without what is left out."""
    wanted, seen = [(root, "")], set[tuple[str, str]]()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen or name not in found or name in LEFT_OUT:
            continue
        seen.add((name, extra))
        for text in found[name].get("requires_dist") or ():
            asked = Requirement(text)
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                wanted += [(normalised(asked.name), each) for each in ("", *asked.extras)]
    return {name for name, _ in seen}


def _write(path: Path, found: Iterable[dict[str, Any]]) -> None:
    """A list, below the comment that its file begins with."""
    lines = path.read_text().splitlines() if path.exists() else []
    comment = [line for line in lines if line.startswith("#")]
    pins = sorted((f"{one['name']}=={one['version']}" for one in found), key=str.lower)
    path.write_text("\n".join([*comment, *pins]) + "\n")
    print(f"{path.name}: {len(pins)}")


if __name__ == "__main__":
    sys.exit(main())
