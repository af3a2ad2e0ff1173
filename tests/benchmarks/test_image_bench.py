from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from coldframe.benchmarks.document import SCHEMA
from coldframe.benchmarks.image.lists import FORMATS, kept
from coldframe.benchmarks.image.watching import Openings, parent_of
from tests.support import unavailable

BENCH = [Path(sys.executable).parent / "coldframe", "bench", "image"]
PATHS = ["/usr/bin/python3.11", "/opt/coldframe/lib/a file.so", '/opt/coldframe/lib/ä".pyc']


def read_by_nydus(text: str) -> list[str]:
    """Lines, of which those count that are absolute and below none before them."""
    found: list[str] = []
    for line in text.splitlines():
        path = line.strip()
        if path.startswith("/") and not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def read_by_nerdctl(text: str) -> list[str]:
    """A stream of JSON objects; their paths are below the root, and each counts once."""
    found: dict[str, None] = {}
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        entry, at = decoder.raw_decode(text, at)
        found[f"/{os.path.normpath(entry['path']).lstrip('/')}"] = None
        while text[at : at + 1].isspace():
            at += 1
    return list(found)


def read_by_soci(text: str) -> list[str]:
    """One JSON array of strings, of which those count that are not blank."""
    found = json.loads(text)
    assert isinstance(found, list)
    assert all(isinstance(path, str) for path in found)
    return [path.strip() for path in found if path.strip()]


@pytest.mark.parametrize(
    ("name", "read"),
    [("plain", read_by_nydus), ("estargz", read_by_nerdctl), ("soci", read_by_soci)],
)
def test_lists_are_what_pullers_read(name: str, read: Callable[[str], list[str]]) -> None:
    """In the order of use, which is that of their fetching."""
    assert read(FORMATS[name](PATHS)) == PATHS
    assert read(FORMATS[name]([])) == []


def test_what_others_open_is_left_out() -> None:
    # 10 is the command, 11 and 12 are its children's children; 20 is somebody else's.
    parents = {10: 2, 11: 10, 12: 11, 20: 1, 21: 20, 2: 1}
    openings = Openings(2, lambda pid: parents.get(pid))
    for at, (path, pid) in enumerate(
        [("/a", 12), ("/b", 20), ("/b", 21), ("/a", 10), ("/c", 11), ("/d", 99), ("/e", 2)]
    ):
        openings.add(path, pid, at)
    assert openings.first_ns == {"/a": 0, "/c": 4}
    assert openings.unknown == 1
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(1 << 22) is None


def test_a_list_has_the_images_own_files_alone(tmp_path: Path) -> None:
    image, model = tmp_path / "image", tmp_path / "model"
    for folder in (image, model):
        folder.mkdir()
    for path in (image / "first", image / "then", image / "late", model / "weights"):
        path.write_bytes(b"12345")
    than = (model / "weights").stat().st_ctime
    (image / "link").symlink_to("first")
    opened = {
        str(image / "then"): 3_000_000_000,
        str(image / "first"): 2_000_000_000,
        str(model / "weights"): 2_500_000_000,
        str(image / "late"): 9_000_000_000,
        str(image / "gone"): 2_000_000_000,
        str(image / "link"): 2_000_000_000,
        "/proc/self/maps": 2_000_000_000,
        str(image): 2_000_000_000,
    }
    found = kept(opened, 1_000_000_000, 4_000_000_000, than, [model])
    assert [(Path(file.path).name, file.size, file.at_s) for file in found] == [
        ("first", 5, 1.0),
        ("then", 5, 2.0),
    ]
    assert kept(opened, 1_000_000_000, 4_000_000_000, than - 1e6, [model]) == []


def test_what_cannot_be_measured_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for arguments, word in (
        ([tmp_path / "none"], "no such directory"),
        ([tmp_path, "--plain", tmp_path], "cannot be written"),
    ):
        done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert word in done.stderr


def test_without_the_right_to_watch_it_says_what_it_takes(tmp_path: Path) -> None:
    setpriv = ["setpriv", "--bounding-set", "-sys_admin"]
    if subprocess.run([*setpriv, "true"], capture_output=True, check=False).returncode != 0:
        unavailable("setpriv cannot be used here")
    words = [*setpriv, *BENCH, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PlatformError" in done.stderr
    assert "CAP_SYS_ADMIN" in done.stderr


@pytest.mark.images
@pytest.mark.timeout(600)
def test_the_benchmark_runs_and_ends_in_one_document(
    demo_model: Callable[..., Path], tmp_path: Path, no_leaks: Path
) -> None:
    lists = {name: tmp_path / name for name in FORMATS}
    flags = [word for name, path in lists.items() for word in (f"--{name}", path)]
    done = subprocess.run(
        [*BENCH, demo_model("llama", "bfloat16"), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "COLDFRAME_RUN_DIR": str(no_leaks)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator(schema).validate(found)
    paths = [file["path"] for file in found["files"]]
    assert found["tier"] == "fresh"
    assert paths == found["prefetch"]["plain"] == lists["plain"].read_text().splitlines()
    names = [Path(path).name for path in paths]
    torch = next(at for at, name in enumerate(names) if name.startswith("libtorch_cpu"))
    assert 0 < torch < len(names) - 1
    assert names.index(Path(sys.executable).resolve().name) < torch
    assert not any(path.endswith(".safetensors") for path in paths)
    times = [file["at_s"] for file in found["files"]]
    assert times == sorted(times)
    assert times[-1] <= found["ttft_s"]["evicted"]
    total = found["total"]
    assert total["files"] == len(paths)
    assert 0 <= total["read_bytes"] <= total["measured_bytes"] <= total["bytes"]
