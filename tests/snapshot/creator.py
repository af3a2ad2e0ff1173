"""A process that puts an image into a store: `python creator.py STORE IMAGE NAME`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["create"]

_ROOT = Path(__file__).parents[2]


def create(store: str | Path, image: Path, name: str) -> subprocess.Popen[bytes]:
    """Starts one; it writes a line when it begins, and the image's id when it is done."""
    command = [sys.executable, "-m", "tests.snapshot.creator", str(store), str(image), name]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE)


def main() -> None:
    from coldframe.snapshot.store import open_store
    from tests.snapshot.images import draft

    store, image, name = sys.argv[1:]
    print("ready", flush=True)
    print(open_store(store).put(image, draft(name)).id, flush=True)


if __name__ == "__main__":
    main()
