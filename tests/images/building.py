"""The image for a CPU built from its Dockerfile, without an engine and without a registry.

`images/base.sh` makes a base of Debian's packages, buildah carries the Dockerfile out over it. Both
are kept under build/images and made again when what goes into them has changed: buildah keeps each
step, and the image has the hash of all its inputs for a name.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.support import unavailable

REPOSITORY = Path(__file__).parents[2]
IMAGES = REPOSITORY / "images"
CACHE = REPOSITORY / "build" / "images"
TOOLS = ("buildah", "runc", "mmdebstrap")
_INPUTS = (
    *(f"images/{name}" for name in ("cpu.Dockerfile", "install.sh", "torch.txt", "wheels.txt")),
    *("pyproject.toml", "README.md", "LICENSE", "loader", "snapshot", "runtime", "benchmarks"),
)
_DYNAMO_INPUTS = ("dynamo.Dockerfile", "dynamo.txt", "install.sh")
_BUILD_S = 1500
_LEFT_OUT = ("__pycache__", "k8s")


def check_tools() -> None:
    """What builds and runs images is here, and may."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        unavailable(f"{', '.join(missing)}: not installed (make images-system)")
    if os.geteuid() != 0:
        unavailable("to build and run images without an engine wants root")


def digest(*paths: Path) -> str:
    """Of the contents of files and folders."""
    found = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and not any(part in _LEFT_OUT for part in file.parts):
                found.update(str(file.relative_to(REPOSITORY)).encode() + b"\0")
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


class Builder:
    """Buildah with a storage of its own under build/images."""

    def __init__(self, cache: Path = CACHE) -> None:
        self._cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    @cached_property
    def flags(self) -> list[str]:
        """Of every call: where images and containers are."""
        storage, run = self._cache / "storage", self._cache / "run"
        return ["--root", str(storage), "--runroot", str(run), "--storage-driver", "overlay"]

    def call(self, *arguments: str | Path, limit: float = 120) -> str:
        """Calls buildah, and returns what it prints.

        Args:
            arguments: Behind its global flags.
            limit: How long it may take, in seconds.
        """
        words = ["buildah", *self.flags, *map(str, arguments)]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=limit, cwd=REPOSITORY
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        words = ["buildah", *self.flags, "inspect", "--type", "image", image]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def config(self, image: str) -> dict[str, Any]:
        """An image's own configuration, as OCI has it."""
        found = json.loads(self.call("inspect", "--type", "image", image))
        config: dict[str, Any] = found["OCIv1"]["config"]
        return config

    def base(self) -> str:
        """The base image; made once."""
        image = f"localhost/coldframe-base:{digest(IMAGES / 'base.sh')}"
        if not self.has(image):
            archive = self._cache / "base.tar"
            done = subprocess.run(
                [IMAGES / "base.sh", archive],
                capture_output=True,
                text=True,
                check=False,
                timeout=_BUILD_S,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            container = self.call("from", "scratch")
            self.call("add", "--quiet", container, archive, "/", limit=300)
            self.call("commit", "--quiet", "--format", "docker", container, image, limit=300)
            self.call("rm", container)
            archive.unlink()
        return image

    def cpu(self) -> str:
        """The image of cpu.Dockerfile; made where its inputs have changed."""
        base = self.base()
        inputs = digest(*(REPOSITORY / name for name in _INPUTS))
        image = f"localhost/coldframe:cpu-{inputs}-{base[-16:]}"
        if not self.has(image):
            self._build("cpu", image, BASE=base)
        return image

    def compiler(self) -> str:
        """The image of compiler.Dockerfile, on the one for a CPU; made where that has changed."""
        cpu, name = self.cpu(), "localhost/coldframe"
        inputs = digest(IMAGES / "compiler.Dockerfile")
        image = f"{name}:compiler-{inputs}-{cpu.rpartition(':')[2]}"
        if not self.has(image):
            torch = f"{name}:torch"
            self._build("cpu", torch, "--target=torch", BASE=self.base())
            arguments = (f"--build-arg=IMAGE={cpu}", f"--build-arg=TORCH={torch}")
            self._build("compiler", image, *arguments)
            # buildah leaves one of a stage behind that it has but copied from.
            for left in self.call("containers", "--quiet", "--filter", f"ancestor={torch}").split():
                self.call("rm", left)
        return image

    def dynamo(self) -> str:
        """The image of dynamo.Dockerfile, on the one for a CPU; made where that has changed."""
        cpu = self.cpu()
        inputs = digest(*(IMAGES / name for name in _DYNAMO_INPUTS))
        image = f"localhost/coldframe:dynamo-{inputs}-{cpu.rpartition(':')[2]}"
        if not self.has(image):
            self._build("dynamo", image, f"--build-arg=IMAGE={cpu}", BASE=self.base())
        return image

    def _build(self, kind: str, image: str, *flags: str, **settings: str) -> None:
        """Has build.sh build an image."""
        config, folders = pip_settings()
        pip = self._cache / "pip.conf"
        pip.write_text(config)
        volumes = [f"--volume={folder}:{folder}:ro" for folder in folders]
        all_flags = ["--isolation=chroot", "--layers", "--pull-never", *volumes, *flags]
        environment = {
            **os.environ,
            "BUILDER": "buildah",
            "BUILDER_GLOBALS": " ".join(self.flags),
            "BUILDER_FLAGS": " ".join(all_flags),
            "PIP_CONF": str(pip),
            **settings,
        }
        done = subprocess.run(
            [IMAGES / "build.sh", kind, image],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=_BUILD_S,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]

    def baked(self, image: str, store: Path, name: str) -> str:
        """An image with the snapshots of a store in it."""
        self.call(
            *("build", "--format", "docker", "--pull-never", "--isolation=chroot"),
            *("--build-arg", f"IMAGE={image}", "-f", IMAGES / "baked.Dockerfile", "-t", name),
            store,
        )
        return name

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """An image's root file system, while the context lasts."""
        container = self.call("from", "--pull-never", image)
        try:
            yield Path(self.call("mount", container))
        finally:
            self.call("rm", container)


def pip_settings() -> tuple[str, list[str]]:
    """This machine's pip, for a build: its settings as one file, and the folders they name."""
    words = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    folders: set[str] = set()
    for line in said.splitlines():
        name, _, value = line.partition("=")
        text = str(ast.literal_eval(value))
        key = name.rpartition(".")[2].strip()
        settings[key] = " ".join(text.split())
        for kind, path in re.findall(r"(file://|(?<!\S))(/[^\s]+)", text):
            folders.add(str(_folder(Path(path), index=bool(kind))))
    folders.discard("/")
    # One that lies in another comes with it.
    inner = {f for f in folders if any(f != o and f.startswith(o + "/") for o in folders)}
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    return "\n".join(lines) + "\n", sorted(folders - inner)


def _folder(path: Path, *, index: bool) -> Path:
    """What a build needs to see of a place: of an index also the files beside it."""
    return path if path.is_dir() and not index else path.parent
