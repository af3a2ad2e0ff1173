"""Snapshots and GPUs: what might take this process down is asked of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.loader.devices.report import ENTRY as GPUS
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.checks.finding import Case, Finding
from coldframe.runtime.machine.device_choice import AUTO, choose_device
from coldframe.runtime.machine.side_process import ask
from coldframe.runtime.planning.target import kernel_module
from coldframe.runtime.units import human_bytes
from coldframe.snapshot.check import ENTRY as SNAPSHOTS
from coldframe.snapshot.reach import may_reach_others

__all__ = ["auto", "gpus", "link", "snapshots"]

_LINK = (
    "from coldframe.loader.packages import add_site_packages; add_site_packages(); "
    "from coldframe.runtime.checks.host_link import main; main(3)"
)


def snapshots(case: Case) -> Finding:
    found = ask(SNAPSHOTS, "snapshots")
    error = found.pop("error")
    if error is not None:
        return Finding("snapshots", "", found, ColdframeError.from_wire(error))
    way = "a user namespace" if found["namespaces"] == "user" else "root's rights"
    says = f"workers can be frozen and restored: CRIU {found['version']} with {way}"
    return Finding("snapshots", says, found)


def gpus(case: Case) -> Finding:
    reaches = may_reach_others()
    module = kernel_module(case.root)
    found = ask(GPUS, "GPUs") | {"kernel_module": module, "reaches_others": reaches}
    error = found.pop("error")
    broken = [gpu["error"] for gpu in found["gpus"] if gpu["error"] is not None]
    if error is None and len(broken) == len(found["gpus"]) > 0:
        error = broken[0]
    if error is not None:
        return Finding("gpus", "", found, ColdframeError.from_wire(error))
    calls = found["calls"]
    says = [
        f"{len(found['gpus'])}, a driver for CUDA {found['driver']} "
        f"(module {found['kernel_module'] or 'unknown'})",
        "contexts can leave a GPU that rests"
        if calls["checkpoint"]
        else f"contexts stay on a GPU that rests: {calls['checkpoint_why']}",
    ]
    if calls["checkpoint"] and not reaches:
        says.append("but not those of workers that run as another user: CAP_SYS_PTRACE is missing")
    says += map(_gpu, found["gpus"])
    remedy = None
    if not calls["arenas"]:
        says.append("its memory cannot be shared: the driver lacks calls of virtual memory (VMM)")
        remedy = "Install a newer driver; until then use --device cpu."
    elif broken:
        remedy = "Leave the GPUs out that are broken: CUDA_VISIBLE_DEVICES."
    return Finding("gpus", "\n".join(says), found, remedy=remedy)


def link(case: Case) -> Finding:
    """How fast bytes go from host memory to the first GPU."""
    choice = choose_device(AUTO, root=case.root)
    if choice.device == "cpu":
        return Finding("host_to_device", f"no GPU: {choice.why}", {"bytes_per_s": None})
    found = ask(_LINK, "the link to the GPU", 60.0)
    if found["error"] is not None:
        raise ColdframeError.from_wire(found["error"])
    rate = found["bytes_per_s"]
    return Finding("host_to_device", f"{human_bytes(rate)}/s to {choice.device}", found)


def auto(case: Case) -> Finding:
    choice = choose_device(AUTO, root=case.root)
    says = f"--device auto takes {choice.device}: {choice.why}"
    return Finding("auto", says, {"device": choice.device, "why": choice.why})


def _gpu(gpu: Mapping[str, Any]) -> str:
    if gpu["error"] is not None:
        return f"{gpu['device']} {gpu['name']}: {ColdframeError.from_wire(gpu['error'])}"
    free, total = human_bytes(gpu["free"]), human_bytes(gpu["total"])
    return f"{gpu['device']} {gpu['name']}: {free} of {total} free, memory can be shared"
