"""What `coldframe bench image` says of the image, asked in a container of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.images.conftest import Image
from tests.images.container import FOR_CRIU, Platform

pytestmark = [pytest.mark.images, pytest.mark.timeout(1800)]


def test_a_start_is_profiled_in_the_container(image: Image, model: Path, tmp_path: Path) -> None:
    platform = Platform(
        args=["bench", "image", "/models/demo", "--json", "--output", "/out/image.json"],
        mounts={"/models/demo": model},
        writable={"/out": tmp_path},
        user=(0, 0),
        capabilities=FOR_CRIU,
        confined=False,
    )
    with image.run(platform) as container:
        assert container.end(300) == 0, container.log
    found = json.loads((tmp_path / "image.json").read_text())
    paths = found["prefetch"]["plain"]
    # All of them are in the image, the large ones among them.
    assert all((image.root / path.lstrip("/")).is_file() for path in paths)
    assert any(path.endswith("/torch/lib/libtorch_cpu.so") for path in paths)
    assert any("coldframe/runtime/gateway" in path for path in paths)
    assert not any(path.startswith(("/models", "/tmp", "/out")) for path in paths)
    # Byte code is there: the few sources that are opened torch and others read as text.
    sources, compiled = (
        [path for path in paths if path.endswith(suffix)] for suffix in (".py", ".pyc")
    )
    assert len(sources) < len(compiled) / 20
    assert 0 < found["total"]["read_bytes"] <= found["total"]["measured_bytes"]
    whole = sum(
        file.stat().st_size
        for file in image.root.rglob("*")
        if file.is_file() and not file.is_symlink()
    )
    assert found["total"]["bytes"] < whole
