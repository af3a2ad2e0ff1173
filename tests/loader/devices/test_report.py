from __future__ import annotations

from coldframe.loader.devices.report import gpu_report
from tests.loader.devices.emulator import Emulator


def test_what_a_gpu_can_do(emulator: Emulator) -> None:
    found = gpu_report(emulator)
    assert (found["error"], found["driver"], found["calls"]["arenas"]) == (None, "13.0", True)
    assert (found["calls"]["checkpoint"], found["calls"]["checkpoint_why"]) == (True, None)
    (gpu,) = found["gpus"]
    assert (gpu["device"], gpu["error"]) == ("cuda:0", None)
    assert 0 < gpu["free"] <= gpu["total"]
    assert gpu["name"]


def test_an_old_driver_says_what_it_lacks(emulator: Emulator) -> None:
    emulator.missing = {"cuMemCreate"}
    found = gpu_report(emulator)
    assert found["error"]["error"] == "DeviceError"
    assert "cuMemCreate" in found["error"]["expected"]
    assert found["gpus"] == []


def test_a_driver_that_cannot_checkpoint_a_process_says_what_it_lacks(emulator: Emulator) -> None:
    emulator.missing = {"cuCheckpointProcessRestore"}
    calls = gpu_report(emulator)["calls"]
    assert (calls["arenas"], calls["checkpoint"]) == (True, False)
    assert calls["checkpoint_why"] == "the driver has no cuCheckpointProcessRestore"


def test_a_gpu_that_has_no_context_to_give(emulator: Emulator) -> None:
    emulator.fail("cuDevicePrimaryCtxRetain", code="CUDA_ERROR_DEVICE_UNAVAILABLE")
    found = gpu_report(emulator)
    assert found["error"] is None
    (gpu,) = found["gpus"]
    assert gpu["error"]["got"].startswith("CUDA_ERROR_DEVICE_UNAVAILABLE")


def test_without_a_library_there_is_no_driver(emulator: Emulator) -> None:
    emulator.library = False
    found = gpu_report(emulator)
    assert found["error"]["error"] == "NoDevice"
