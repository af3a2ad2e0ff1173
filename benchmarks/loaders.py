"""Loaders to measure: each loads a checkpoint into host memory, in a process of its own.

The clock runs from just before the checkpoint is opened until its last byte is there and every
page of it has been touched; imports and the start of processes are not in it, for nobody. Each
script prints one JSON object: seconds, bytes, CPU seconds and peak memory of the process that
loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from coldframe.loader.errors import PlatformError

__all__ = ["LOADERS", "load_once"]

_PROLOGUE = """
import glob, json, os, resource, sys, time
path, options = sys.argv[1], json.loads(sys.argv[2])
files = sorted(glob.glob(os.path.join(path, "*.safetensors")))
def cpu(who=resource.RUSAGE_SELF):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime
def report(seconds, nbytes, cpu_s):
    peak = 1024 * max(resource.getrusage(who).ru_maxrss
                      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "cpu_s": cpu_s, "peak": peak}))
"""

_TORCH = """
import torch
def touch(tensors):
    return sum(t.numel() * t.element_size() for t in tensors
               if t.reshape(-1).view(torch.uint8)[::4096].sum() >= 0)
"""

_COLDFRAME = """
from coldframe.loader.client import MemoryClient
from coldframe.runtime.early import MemoryProcess
from coldframe.loader.process import remove_run_dir
from coldframe.loader.wire import Channel
memory = MemoryProcess()
owner = Channel(memory.socket)
owner.send({"type": "load", "model": path, **options})
owner.send({"type": "kv", "block_bytes": 4096, "blocks": 1, "lease_s": 30})
while (message := owner.recv(60)).kind != "listening":
    pass
client = MemoryClient(os.path.join(memory.run_dir, "memory.sock"), "bench")
plan, weights, _ = client.wait_arenas()
client.wait_stage(len(plan.stages) - 1)
while (message := owner.recv(60)).kind not in ("loaded", "failed"):
    pass
if message.kind == "failed":
    sys.exit(str(message.body["error"]))
spans = message.body["spans"]
begun = min(s[2] for s in spans if s[0] == "checkpoint_open")
ready = max(s[3] for s in spans if s[0].startswith("stage_ready["))
touching, used = time.monotonic(), cpu()
for run in (run for stage in plan.stages for extent in stage.extents for run in extent.runs):
    bytes(weights.view(run.arena_offset, run.length)[::4096])
touched, used = time.monotonic() - touching, cpu() - used
owner.close()
memory.child.wait()
report((ready - begun) / 1e9 + touched, plan.read_bytes, used + cpu(resource.RUSAGE_CHILDREN))
"""

_SAFETENSORS = (
    _TORCH
    + """
from safetensors import safe_open
started, used = time.perf_counter(), cpu()
tensors = {}
for file in files:
    with safe_open(file, framework="pt", device="cpu") as opened:
        tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
nbytes = touch(tensors.values())
report(time.perf_counter() - started, nbytes, cpu() - used)
"""
)

_RUNAI = (
    _TORCH
    + """
from runai_model_streamer import SafetensorsStreamer
started, used = time.perf_counter(), cpu()
with SafetensorsStreamer() as streamer:
    streamer.stream_files(files, device="cpu")
    tensors = dict(streamer.get_tensors())
    nbytes = touch(tensors.values())
report(time.perf_counter() - started, nbytes, cpu() - used)
"""
)

_FASTSAFETENSORS = (
    _TORCH
    + """
from fastsafetensors import fastsafe_open
started, used = time.perf_counter(), cpu()
with fastsafe_open(filenames=files, nogds=True, device="cpu") as opened:
    tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
nbytes = touch(tensors.values())
report(time.perf_counter() - started, nbytes, cpu() - used)
"""
)

_RAW = """
import ctypes, mmap, threading
from coldframe.loader.arena import Reservation, Segment, round_up
from coldframe.loader.devices import open_device
from coldframe.loader.sources.direct import open_direct
block, piece = 4096, 8 << 20
sizes = [round_up(os.path.getsize(file), block) for file in files]
fds = [open_direct(file) for file in files]
if None in fds:
    sys.exit("the file system refuses O_DIRECT")
total = sum(round_up(size, 2 << 20) for size in sizes)
started, used = time.perf_counter(), cpu()
fd = open_device("cpu").allocate("raw", total, now=True)
arena = Reservation(total)
arena.attach([Segment(fd, 0, total, 0, True)])
view, jobs, base = arena.view(), [], 0
for fd, size in zip(fds, sizes):
    jobs += [(fd, at, base + at, min(piece, size - at)) for at in range(0, size, piece)]
    base += round_up(size, 2 << 20)
left = iter(jobs)
lock = threading.Lock()
def read():
    while True:
        with lock:
            job = next(left, None)
        if job is None:
            return
        fd, at, to, length = job
        os.preadv(fd, [view[to : to + length]], at)
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report(time.perf_counter() - started, sum(sizes), cpu() - used)
"""

LOADERS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "coldframe": (_COLDFRAME, {}, {}),
    "coldframe --copy": (_COLDFRAME, {"copy": True}, {}),
    "raw O_DIRECT": (_RAW, {}, {}),
    "safetensors": (_SAFETENSORS, {}, {}),
    "runai": (_RUNAI, {}, {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}),
    "runai io_uring": (_RUNAI, {}, {"RUNAI_STREAMER_FS_STRATEGY": "io_uring_direct"}),
    "fastsafetensors": (_FASTSAFETENSORS, {}, {}),
}
"""Script, options of ours, and environment by name."""


def load_once(name: str, model: Path, python: str = sys.executable) -> dict[str, float]:
    """Runs one loader once.

    Args:
        name: One of `LOADERS`.
        model: The checkpoint's directory.
        python: The interpreter that has the loader installed.

    Raises:
        PlatformError: It failed, or is not installed there.
    """
    script, options, environment = LOADERS[name]
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _PROLOGUE + script, str(model), json.dumps(options)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PlatformError("a loader failed", where=name, got=last)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result
