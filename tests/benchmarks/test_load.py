from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.harness import warm_page_cache
from coldframe.benchmarks.load import evict
from coldframe.benchmarks.loaders import load_once
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.errors import PlatformError
from tests.loader.web.servers import nginx


@pytest.fixture
def model(own_model: Callable[..., Path]) -> Path:
    return own_model("llama", "bfloat16")


def cached(model: Path) -> int:
    total = 0
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            total += cached_bytes(stream.fileno(), 0, file.stat().st_size)
    return total


def test_eviction_is_real(model: Path) -> None:
    warm_page_cache(model)
    assert cached(model) == sum(file.stat().st_size for file in model.glob("*.safetensors"))
    evict(model)
    assert cached(model) == 0


def test_eviction_that_fails_is_an_error(model: Path) -> None:
    warm_page_cache(model)
    file = sorted(model.glob("*.safetensors"))[0]
    with file.open("r+b") as stream:
        # Pages that somebody has mapped stay.
        area = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        bytes(area)
        with pytest.raises(PlatformError, match="cannot be evicted"):
            evict(model)
        area.close()


def test_a_loader_that_is_not_installed_is_an_error(model: Path) -> None:
    with pytest.raises(PlatformError, match="No module named"):
        load_once("runai", model)


@pytest.mark.parametrize("name", ["coldframe", "coldframe --copy", "raw O_DIRECT", "safetensors"])
def test_loaders_load_all_of_it(model: Path, name: str) -> None:
    result = load_once(name, model)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert 0.9 * size < result["bytes"] < 1.2 * size
    assert result["seconds"] > 0
    assert result["peak"] > 0


def test_a_raw_read_from_sockets_is_of_all_of_it_or_an_error(model: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in model.glob("*.safetensors")}
    with nginx(model.parent) as base:
        place = f"{base}/{model.name}"
        for more in ({}, {"sizes": sizes}):
            result = load_once("raw sockets", place, more=more, limit_s=60)
            assert result["bytes"] == sum(sizes.values())
            assert result["seconds"] > 0
        with pytest.raises(PlatformError, match=r"raw sockets: .*404"):
            load_once("raw sockets", place, more={"sizes": {"none.safetensors": 5}})


@pytest.mark.heavy
def test_the_benchmark_leaves_out_what_is_not_installed(model: Path, no_leaks: Path) -> None:
    command = [Path(sys.executable).parent / "coldframe", "bench", "load", model, "--runs", "1"]
    done = subprocess.run(
        [*command, "--against", "safetensors,runai"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document["left_out"]) == ["runai"]
    names = [row["name"] for row in document["rows"]]
    assert {"cold: coldframe", "warm: coldframe", "cold: raw O_DIRECT"} <= set(names)
    assert {"cold: our time / safetensors", "warm: our time / safetensors"} <= set(names)
