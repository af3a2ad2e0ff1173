from __future__ import annotations

import json
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.gpu_image import GpuImage
from coldframe.snapshot.gpus import FOLDER, Gpus
from coldframe.snapshot.machine import Machine
from tests.snapshot.images import MACHINE
from tests.snapshot.nvidia import CLOSED, OPEN, kernel_says
from tests.snapshot.test_manifest import GPU


@pytest.mark.parametrize("line", [CLOSED, OPEN])
def test_what_the_kernels_module_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    kernel_says(tmp_path, ["NVIDIA H200", "NVIDIA H200"], "570.86.15", line)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert Gpus.here() == Gpus("570.86.15", ("NVIDIA H200", "NVIDIA H200"))
    assert Gpus.here().name == "2 x NVIDIA H200"
    kernel_says(tmp_path, ["NVIDIA T4"], "570.86.15", line)
    assert Gpus.here().name == "NVIDIA H200, NVIDIA T4"  # as the first became the other
    here = Machine.here(device="cuda")
    assert (here.gpu, here.driver) == ("NVIDIA H200, NVIDIA T4", "570.86.15")
    on_cpu = Machine.here()  # is not bound to a driver
    assert (on_cpu.device, on_cpu.gpu, on_cpu.driver) == ("cpu", None, None)


def test_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "nothing"))
    assert Gpus.here() == Gpus(None, ())
    assert Gpus.here().name is None
    (tmp_path / "version").write_text("NVRM version: something else entirely\n")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert Gpus.here() == Gpus(None, ())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"device": "cpu", "gpu": None, "driver": None}, "device"),
        ({"gpu": "NVIDIA T4"}, "gpu"),
        ({"gpu": "2 x NVIDIA H200"}, "gpu"),
        ({"gpu": None}, "gpu"),
        ({"driver": "580.1.3"}, "driver"),
        ({"driver": None}, "driver"),
    ],
)
def test_another_gpu_or_driver_is_refused_by_name(change: dict[str, str], field: str) -> None:
    made_on = MACHINE._replace(device="cuda", gpu="NVIDIA H200", driver="580.1.2")
    assert made_on.refusal(made_on) is None
    refusal = made_on.refusal(made_on._replace(**change))  # type: ignore[arg-type]
    assert refusal is not None
    assert refusal.field == field


def test_the_part_of_an_image_that_was_on_a_gpu_travels() -> None:
    assert GpuImage.from_json(json.loads(json.dumps(GPU.to_json()))) == GPU


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpus", []),
        ("gpus", ["GPU-1"]),
        ("gpus", [["GPU-1", 7]]),
        ("graphs", [[1]]),
        ("graphs", [[0, 8]]),
        ("graphs", [["1", 8]]),
        ("graphs", [[1, True]]),
        ("blocks", 0),
        ("context_bytes", -1),
        ("plan", None),
        ("more", 1),
    ],
)
def test_a_wrong_field_of_it_is_named(name: str, value: object) -> None:
    with pytest.raises(SnapshotError, match=name):
        GpuImage.from_json({**GPU.to_json(), name: value})
