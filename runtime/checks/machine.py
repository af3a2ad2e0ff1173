"""CPU and memory, and what the cgroup leaves of them."""

from __future__ import annotations

import mmap
import os
from contextlib import closing

from coldframe.loader.cgroup import cpu_count, cpu_quota, meminfo, memory_available, memory_limit
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.devices.hugepages import allocate_huge
from coldframe.loader.errors import ColdframeError, DeviceFull, PlatformError
from coldframe.loader.sources.location import parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.runtime.machine.device_choice import CPU, choose_device
from coldframe.runtime.planning.target import GPU_OVERHEAD, Target
from coldframe.runtime.units import human_bytes
from coldframe.snapshot.machine import cpu_here

__all__ = ["cpu", "huge_pages", "memory", "model_memory", "shm"]

_REPLICA = 500_000_000
"""What a replica's processes take for themselves, about; `coldframe plan` measures it."""
_LITTLE_SHM = 64 << 20


def cpu(case: Case) -> Finding:
    vendor, features = cpu_here()
    uname, quota = os.uname(), cpu_quota(case.root)
    machine = os.cpu_count()
    facts = {
        "arch": uname.machine,
        "vendor": vendor,
        "kernel": uname.release,
        "cores": len(os.sched_getaffinity(0)),
        "machine_cores": machine,
        "quota": quota,
        "threads": cpu_count(case.root),
        "features": list(features),
    }
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    says = (
        f"{uname.machine} ({vendor}), {facts['cores']} cores, {limit}: {facts['threads']} threads; "
        f"Linux {uname.release}"
    )
    remedy = None
    if facts["threads"] == 1:
        says += "; both workers, the stream and the gateway share one"
        remedy = "Give it a second CPU: a cold start computes while it loads."
    return Finding("cpu", says, facts, needed=True, remedy=remedy)


def memory(case: Case) -> Finding:
    total, available = _told("MemTotal", case), memory_available(case.root)
    limit, page = memory_limit(case.root), os.sysconf("SC_PAGE_SIZE")
    facts = {"total": total, "available": available, "limit": limit, "page_size": page}
    limited = "no limit" if limit is None else f"a limit of {human_bytes(limit)}"
    says = (
        f"{human_bytes(available)} of {human_bytes(total)} available, {limited}, "
        f"pages of {page // 1024} KiB"
    )
    remedy = None
    if available < 2 * _REPLICA:
        remedy = (
            f"A replica's processes take about {human_bytes(_REPLICA)} beside its weights: "
            "raise the limit, or end something else."
        )
    return Finding("memory", says, facts, _cannot_share(page), needed=True, remedy=remedy)


def model_memory(case: Case) -> Finding:
    """The model against what there is of the device that it would be on."""
    assert case.model is not None
    with closing(open_origin(parse_location(case.model), hurry=True)) as origin:
        checkpoint = Checkpoint.open(origin)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    device, available = _device(case)
    needed = nbytes + (_REPLICA if device == CPU else GPU_OVERHEAD)
    facts = {"weights": nbytes, "needed": needed, "available": available, "device": device}
    says = (
        f"weights of {human_bytes(nbytes)}, {human_bytes(needed)} with a replica's processes, "
        f"of {human_bytes(available)} on {device}"
    )
    error: ColdframeError | None = None
    if needed > available:
        of = "this machine's" if device == CPU else f"{device}'s"
        error = DeviceFull(
            f"the model does not fit {of} memory",
            expected=f"{human_bytes(needed)} available",
            got=human_bytes(available),
            hint="Raise the memory limit, or take a GPU: --device cuda."
            if device == CPU
            else "Take a larger GPU, or the CPU: --device cpu.",
        )
    return Finding("model", says, facts, error, needed=True)


def _device(case: Case) -> tuple[str, int]:
    """Where a replica would compute, and the bytes that nobody has there.

    Raises:
        NoDevice: The device that is named is not there.
        DeviceError: It cannot be used.
    """
    choice = choose_device(case.device, root=case.root)
    if choice.device != CPU:
        target = Target.of(choice)
        if target.gpu is not None:
            return target.choice.device, target.available
    return CPU, memory_available(case.root)


def huge_pages(case: Case) -> Finding:
    size = _told("Hugepagesize", case)
    free = meminfo("HugePages_Free", case.root) or 0
    got = allocate_huge("doctor", size)
    if got is None:
        raise PlatformError(
            "no huge pages can be had, so that loads fault in small ones",
            expected="reserved ones (vm.nr_hugepages), or CAP_SYS_ADMIN for a tmpfs with them",
            got=f"{free} reserved and free",
            hint="Reserve some, or leave it: loads into memory take longer, all else is the same.",
        )
    fd, way = got
    os.close(fd)
    facts = {"size": size, "free": free, "way": way}
    return Finding("huge_pages", f"of {human_bytes(size)}, by a {way}", facts)


def shm(case: Case) -> Finding:
    """Of no use to coldframe, whose memory has no name; NCCL and torch's own workers need it."""
    path = case.root / "dev/shm"
    status = os.statvfs(path)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    says = f"{human_bytes(free)} of {human_bytes(size)} free in {path}"
    remedy = None
    if free < _LITTLE_SHM:
        remedy = "vLLM on several GPUs needs more: docker run --shm-size=1g. coldframe needs none."
    return Finding("shm", says, {"size": size, "free": free}, remedy=remedy)


def _told(key: str, case: Case) -> int:
    found = meminfo(key, case.root)
    if found is None:
        raise PlatformError(
            "the kernel does not tell of it", where=case.root / "proc/meminfo", expected=key
        )
    return found


def _cannot_share(page: int) -> ColdframeError | None:
    """Why no memory can be shared by descriptor, which all arenas are."""
    try:
        fd = os.memfd_create("coldframe-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, page)
            with mmap.mmap(fd, page) as view:
                view[0] = 1
        finally:
            os.close(fd)
    except OSError as error:
        return PlatformError(
            "memory cannot be shared",
            where="memfd",
            got=error.strerror,
            hint="Allow memfd_create (a seccomp profile forbids it).",
        )
    return None
