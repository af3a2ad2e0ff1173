"""What `--device auto` makes of machines; each is a folder with the device files that it shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.machine import device_choice
from coldframe.runtime.machine.device_choice import DeviceChoice, choose_device, parse_device
from coldframe.snapshot.machine import torch_version


def machine(root: Path, *files: str) -> Path:
    (root / "dev").mkdir(parents=True)
    for name in files:
        (root / "dev" / name).touch()
    return root


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Something of the bindings' name that can be found, and must not be imported."""
    package = tmp_path / "packages/cuda/bindings"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(device_choice, "_CPU_TORCH", "no torch ends so")


@pytest.mark.parametrize("wanted", ["auto", "", " auto "])
@pytest.mark.parametrize("visible", [None, "0", "1,0", "GPU-8f3c", " 0"])
@pytest.mark.usefixtures("bindings")
def test_a_machine_with_a_gpu(wanted: str, visible: str | None, tmp_path: Path) -> None:
    root = machine(tmp_path / "m", "nvidiactl", "nvidia-uvm", "nvidia3")
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    choice = choose_device(wanted, (None, None), root, environ)
    assert (choice.device, choice.fall_back) == ("cuda:0", True)
    assert choice.why


@pytest.mark.parametrize(
    ("files", "visible", "why"),
    [
        ((), None, "nvidiactl"),
        (("nvidia0",), None, "nvidiactl"),
        (("nvidiactl", "nvidia-uvm", "nvidiax", "nvidia0x"), None, "has no GPU"),
        (("nvidiactl", "nvidia0"), "", "CUDA_VISIBLE_DEVICES"),
        (("nvidiactl", "nvidia0"), "-1", "CUDA_VISIBLE_DEVICES"),
        (("nvidiactl", "nvidia0"), "-1,0", "CUDA_VISIBLE_DEVICES"),
    ],
)
@pytest.mark.usefixtures("bindings")
def test_a_machine_without(
    files: tuple[str, ...], visible: str | None, why: str, tmp_path: Path
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    choice = choose_device("auto", (), machine(tmp_path / "m", *files), environ)
    assert (choice.device, choice.fall_back) == ("cpu", False)
    assert choice.why is not None
    assert why in choice.why


def test_without_bindings_there_is_no_way_to_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "_BINDINGS", "cuda.nowhere")
    choice = choose_device("auto", (), machine(tmp_path, "nvidiactl", "nvidia0"), {})
    assert choice.device == "cpu"
    assert "coldframe[cuda]" in str(choice.why)


@pytest.mark.usefixtures("bindings")
def test_a_torch_without_cuda_is_of_no_use_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "_CPU_TORCH", torch_version()[-3:])
    choice = choose_device("auto", (), machine(tmp_path / "m", "nvidiactl", "nvidia0"), {})
    assert choice == DeviceChoice("cpu", f"torch {torch_version()} is for the CPU alone")


def test_who_names_one_gets_it_whatever_there_is(tmp_path: Path) -> None:
    nothing = machine(tmp_path)
    assert choose_device("cuda", (), nothing, {}) == DeviceChoice("cuda:0")
    assert choose_device("cuda:2", ("cpu",), nothing, {}) == DeviceChoice("cuda:2")
    assert choose_device("auto", (None, "cuda:1"), nothing, {}) == DeviceChoice("cuda:1")
    assert choose_device("cpu", (), nothing, {}) == DeviceChoice("cpu")


@pytest.mark.parametrize(
    ("text", "name"),
    [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:07", "cuda:7"), ("cuda:1234", "cuda:1234")],
)
def test_a_device_has_one_name(text: str, name: str) -> None:
    assert parse_device(text) == name


@pytest.mark.parametrize(
    "text", ["", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:12345", "cuda:\u0661"]
)
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(RequestError, match="no such device"):
        parse_device(text, "--device")
