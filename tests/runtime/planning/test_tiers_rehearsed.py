"""Plans where an image or a template is there, and of models that are elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.snapshot.criu import Criu
from tests.loader.web.servers import nginx
from tests.runtime.planning.plans import plan
from tests.runtime.snapshots import COLDFRAME
from tests.support import without_settings

pytestmark = [pytest.mark.heavy, pytest.mark.alone]

Make = Callable[..., Path]


def times(document: dict[str, Any], tier: str) -> list[float | None]:
    return [start["ttft_s"] for start in document["starts"] if start["tier"] == tier]


def test_an_image_is_rehearsed_and_stays_as_it_was(
    demo_model: Make, tmp_path: Path, criu: Criu
) -> None:
    model, store = demo_model("llama", "bfloat16"), tmp_path / "store"
    create = [COLDFRAME, "snapshot", "create", model, "--snapshot-store", store, "--graphs", "off"]
    subprocess.run(create, check=True, capture_output=True, timeout=100, env=without_settings())
    before = {path: path.stat().st_size for path in store.rglob("*") if path.is_file()}
    document = plan(tmp_path / "c", model, "--snapshot-store", store)
    assert None not in times(document, "restored")
    assert document["next_start"]["tier"] == "restored"
    replicas = {(r["tier"], r["through"], r["weights"]) for r in document["memory"]["replica"]}
    assert ("restored", "http", "mapped") in replicas
    for replica in document["memory"]["replica"]:
        assert replica["parts"]["processes"] > 50e6  # clones are counted, too
    assert {path: path.stat().st_size for path in store.rglob("*") if path.is_file()} == before
    # The borrowed names are gone.
    assert all(path.stat().st_nlink == 1 for path in before)
    # Of another model it is none.
    other = plan(tmp_path / "c", demo_model("qwen3", "bfloat16"), "--snapshot-store", store)
    assert times(other, "restored") == [None] * 4


def test_a_template_that_is_resident_is_rehearsed(demo_model: Make, tmp_path: Path) -> None:
    model = demo_model("llama", "bfloat16")
    runs = Path(os.path.realpath("/tmp")) / f"cf-{os.getpid()}"
    runs.mkdir()
    env = {**without_settings(), "COLDFRAME_RUN_DIR": str(runs), "XDG_CACHE_HOME": str(tmp_path)}
    call = [COLDFRAME, "snapshot", "template", str(model), "--graphs", "off", "--json"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["model"] == str(model)
        document = plan(tmp_path / "c", model, COLDFRAME_RUN_DIR=str(runs))
        assert None not in times(document, "template")
        assert document["next_start"]["tier"] == "template"
        forked = [r for r in document["memory"]["replica"] if r["tier"] == "template"]
        assert {replica["through"] for replica in forked} == {"run", "http"}
        for replica in forked:
            assert replica["parts"]["weights"] > 0
            assert replica["parts"]["processes"] > 50e6  # forks are counted, too
        assert len(list((runs / f"coldframe-templates-{os.getuid()}").iterdir())) == 1
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()
        for path in sorted(runs.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        runs.rmdir()


def test_a_model_that_is_elsewhere_is_rehearsed_with_its_small_files(
    demo_model: Make, tmp_path: Path
) -> None:
    model = demo_model("llama", "bfloat16")
    with nginx(model.parent) as base:
        document = plan(tmp_path / "c", f"{base}/{model.name}")
    fresh = [s for s in document["starts"] if s["tier"] == "fresh"]
    assert [s["ttft_s"] is None for s in fresh] == [False, False, True, True]
    assert "no page cache" in fresh[-1]["why"]
    assert document["next_start"] == {"tier": "fresh", "cache": "cold", "through": "run"}


def test_where_there_is_no_room_it_is_said(
    demo_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = demo_model("llama", "bfloat16")
    document = plan(tmp_path / "c", model, TMPDIR="/proc")
    # No start can be told, and the rest of the plan stands.
    assert times(document, "fresh") == [None] * 4
    assert document["predicted_ttft_s"] >= document["worker_start_s"] > 0
    assert document["memory"]["overhead_source"] == "assumed"


def test_a_long_temporary_directory_is_in_nobodys_way(demo_model: Make, tmp_path: Path) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    document = plan(tmp_path / "c", demo_model("llama", "bfloat16"), TMPDIR=str(long))
    assert None not in times(document, "fresh")
    assert list(long.iterdir()) == []


def test_what_kept_a_rehearsal_from_its_sockets_is_said_with_the_remedy(
    demo_model: Make, tmp_path: Path
) -> None:
    long = tmp_path / ("r" * 100)
    long.mkdir()
    model = demo_model("llama", "bfloat16")
    document = plan(tmp_path / "c", model, COLDFRAME_RUN_DIR=str(long))
    (why,) = {start["why"] for start in document["starts"] if start["tier"] == "fresh"}
    assert "the run directory's path is too long for sockets in it" in why
    assert "Set COLDFRAME_RUN_DIR to a directory with a shorter path" in why


def test_why_an_image_was_not_rehearsed_is_kept_with_the_rates(
    demo_model: Make, tmp_path: Path, criu: Criu
) -> None:
    model, store = demo_model("llama", "bfloat16"), tmp_path / "store"
    create = [COLDFRAME, "snapshot", "create", model, "--snapshot-store", store, "--graphs", "off"]
    subprocess.run(create, check=True, capture_output=True, timeout=100, env=without_settings())
    for path in (store / "objects").iterdir():
        path.write_bytes(bytes(len(path.read_bytes())))
    for _ in range(2):  # rehearsed, and then kept
        document = plan(tmp_path / "c", model, "--snapshot-store", store)
        assert None not in times(document, "fresh")
        (why,) = {start["why"] for start in document["starts"] if start["tier"] == "restored"}
        assert "a rehearsal failed" in why
    assert document["calibration"]["source"] == "kept"
