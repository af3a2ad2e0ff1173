"""The driver's calls, and an error of ours for each of its."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cuda.bindings import driver as real

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import NEEDED, Driver
from coldframe.loader.devices.driver_errors import kind_of
from coldframe.loader.errors import DeviceError, DeviceFull, DeviceLost, NoDevice
from tests.loader.devices.emulator import GRANULARITY, Emulator


def no_driver_here() -> bool:
    try:
        real.cuInit(0)
    except RuntimeError:
        return True
    return False


def test_arguments_are_what_the_bindings_take() -> None:
    """The bindings convert all arguments before they look for a library, and find none."""
    if not no_driver_here():
        pytest.skip("there is a driver here, to which these arguments would go")
    driver = Driver(real)
    stream, event, memory = real.CUstream(1), real.CUevent(1), real.CUmemGenericAllocationHandle(1)
    calls = [
        lambda: driver.map(1 << 45, GRANULARITY, memory),
        lambda: driver.unmap(1 << 45, GRANULARITY),
        lambda: driver.create(0, GRANULARITY),
        lambda: driver.release(memory),
        lambda: driver.export(memory),
        lambda: driver.import_fd(3),
        lambda: driver.reserve(GRANULARITY, GRANULARITY, 1 << 45),
        lambda: driver.reserve(GRANULARITY, GRANULARITY, 0),
        lambda: driver.free_addresses(1 << 45, GRANULARITY),
        lambda: driver.set_access(1 << 45, GRANULARITY, 0, writable=True),
        lambda: driver.set_access(1 << 45, GRANULARITY, 0, writable=False),
        lambda: driver.granularity(0),
        lambda: driver.memory_info(),
        lambda: driver.device_count(),
        lambda: driver._device(0),
        lambda: driver.make_current(real.CUcontext(1)),
        lambda: driver.register_host(4096, 4096),
        lambda: driver.unregister_host(4096),
        lambda: driver.stream(),
        lambda: driver.destroy_stream(stream),
        lambda: driver.synchronize(stream),
        lambda: driver.event(),
        lambda: driver.destroy_event(event),
        lambda: driver.record(event, stream),
        lambda: driver.wait(event),
        lambda: driver.copy_in(1 << 45, 4096, 8, stream),
        lambda: driver.copy_rows_in(1 << 45, 4096, 8, 2, 16, stream),
        lambda: driver.copy_out(4096, 1 << 45, 8, stream),
        lambda: driver.fill_zeros(1 << 45, 8, stream),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="a driver with cu"):
            call()


def test_no_driver_and_no_bindings_are_two_errors() -> None:
    with pytest.raises(NoDevice, match=r"no CUDA driver.*libcuda\.so"):
        Driver.open(Emulator(library=False))
    code = (
        "import sys; sys.modules['cuda.bindings.driver'] = None\n"
        "from coldframe.loader.devices.driver import Driver\n"
        "from coldframe.loader.errors import NoDevice\n"
        "try: Driver.open()\n"
        "except NoDevice as error: print(error.what, '|', error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "bindings to the CUDA driver are not installed" in done.stdout
    assert "coldframe[cuda]" in done.stdout


def test_the_bindings_of_this_machine_open_or_say_why() -> None:
    if no_driver_here():
        with pytest.raises(NoDevice, match=r"no CUDA driver.*libcuda\.so"):
            Driver.open()
    else:
        assert Driver.open().device_count() >= 1


def test_nothing_of_cuda_is_imported_before_a_device_is_opened() -> None:
    code = (
        "import sys\n"
        "import coldframe.loader.devices.driver, coldframe.loader.devices.ring\n"
        "import coldframe.loader.devices.device_arena, coldframe.loader.devices.copies\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'cuda'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NEEDED)
def test_an_old_driver_is_found_by_what_it_lacks(name: str) -> None:
    with pytest.raises(DeviceError, match=f"too old, expected {name}"):
        Driver.open(Emulator(missing=[name]))


def test_a_driver_that_is_too_old_to_be_asked_is_too_old() -> None:
    with pytest.raises(DeviceError, match="too old"):
        Driver.open(Emulator(missing=["cuGetProcAddress"]))


def test_symbols_are_asked_for() -> None:
    driver = Driver.open(Emulator(missing=["cuMemcpy2DAsync"]))
    assert driver.has("cuMemcpyHtoDAsync")
    assert not driver.has("cuMemcpy2DAsync")
    assert not driver.has("cuNoSuchCall")
    with pytest.raises(DeviceError, match="a driver with cuMemcpy2DAsync"):
        driver.copy_rows_in(1, 2, 3, 4, 5, real.CUstream(1))


def test_no_gpu_and_another_than_there_is() -> None:
    with pytest.raises(NoDevice, match=r"CUDA_ERROR_NO_DEVICE \(no device\)\. Give the container"):
        Driver.open(Emulator(devices=0))
    with pytest.raises(NoDevice, match="no such GPU, in cuda:2, expected less than 2"):
        Context(Driver.open(Emulator(devices=2)), 2)


def test_a_gpu_that_shares_nothing_is_refused() -> None:
    with pytest.raises(NoDevice, match="cannot be shared between processes, in cuda:0, Emulated"):
        Context(Driver.open(Emulator(can_share=False)), 0)


def test_no_free_memory_is_an_error_of_its_own(gpu: Context) -> None:
    with pytest.raises(DeviceFull) as caught:
        gpu.driver.create(0, 2 << 30)
    assert caught.value.where == "cuMemCreate, cuda:0"
    assert caught.value.expected == "2,147,483,648 bytes"
    assert caught.value.got == "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"
    assert "nvidia-smi" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", DeviceFull, "smaller model"),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", DeviceLost, None),
        ("CUDA_ERROR_LAUNCH_FAILED", DeviceLost, None),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", DeviceLost, None),
        ("CUDA_ERROR_INVALID_HANDLE", DeviceError, "released already"),
        ("CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", DeviceError, "each other's memory"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", NoDevice, "kernel's driver"),
        ("CUDA_ERROR_NO_DEVICE", NoDevice, "--gpus"),
        ("CUDA error 12345", DeviceError, "documentation"),
    ],
)
def test_each_of_the_drivers_errors_is_one_of_ours(
    name: str, kind: type[DeviceError], hint: str | None
) -> None:
    found, text = kind_of(name)
    assert found is kind
    assert text is None if hint is None else hint in str(text)


def test_every_name_that_is_told_apart_is_one_of_the_drivers() -> None:
    from coldframe.loader.devices import driver_errors

    known = {code.name for code in real.CUresult}
    assert known >= driver_errors._BROKEN
    short = {name.removeprefix("CUDA_ERROR_") for name in known}
    assert set(driver_errors._ABSENT) | set(driver_errors._HINTS) <= short


def test_each_call_can_fail_and_names_the_call(emulator: Emulator, gpu: Context) -> None:
    gpu.bind()
    emulator.fail("cuStreamCreate", code="CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")
    with pytest.raises(DeviceError, match=r"in cuStreamCreate, got CUDA_ERROR_PEER_ACCESS_UNSUPP"):
        gpu.driver.stream()
    emulator.fail("cuMemGetInfo", code="CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceLost, match="dmesg"):
        gpu.available()
    assert gpu.available() == 1 << 30


def test_an_error_that_the_bindings_do_not_know_yet_is_one_of_ours(
    emulator: Emulator, gpu: Context
) -> None:
    emulator.fail("cuMemCreate", code="12345")
    with pytest.raises(DeviceError, match=r"12345 is not a valid CUresult\. Update cuda-bind"):
        gpu.driver.create(0, GRANULARITY)


def test_several_gpus_in_one_thread() -> None:
    emulator = Emulator(devices=2)
    driver = Driver.open(emulator)
    one, two = Context(driver, 0), Context(driver, 1)
    assert one.available() == two.available() == 1 << 30
    memory = driver.create(1, GRANULARITY)
    assert (one.available(), two.available()) == (1 << 30, (1 << 30) - GRANULARITY)
    driver.release(memory)
    one.close()
    two.close()
    assert emulator.left() == []


def test_a_device_says_what_it_is(gpu: Context) -> None:
    assert gpu.name == "cuda:0"
    assert gpu.driver.device_name(0) == "Emulated GPU 0"
    assert gpu.granularity == GRANULARITY
