"""Loaders to measure: each loads a checkpoint into host memory, in a process of its own.

The clock runs from just before the checkpoint is opened until its last byte is there and every
page of it has been touched, by another process than the one that loads where there are two;
imports and the start of processes are not in it, for nobody. Each
script prints one JSON object: seconds, bytes, CPU seconds and peak memory of the process that
loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from coldframe.loader.errors import PlatformError

__all__ = ["LOADERS", "load_once"]

_PROLOGUE = """
import glob, json, os, resource, sys, time
path, options = sys.argv[1], json.loads(sys.argv[2])
files = [] if "://" in path else sorted(glob.glob(os.path.join(path, "*.safetensors")))
def cpu(who=resource.RUSAGE_SELF):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime
def report(seconds, nbytes, cpu_s, **more):
    peak = 1024 * max(resource.getrusage(who).ru_maxrss
                      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "bytes": nbytes, "cpu_s": cpu_s, "peak": peak, **more}))
"""

_TORCH = """
import torch
def touch(tensors):
    return sum(t.numel() * t.element_size() for t in tensors
               if t.reshape(-1).view(torch.uint8)[::4096].sum() >= 0)
"""

_COLDFRAME = """
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.start.early import MemoryProcess
from coldframe.loader.process import remove_run_dir
from coldframe.loader.wire import Channel
def service_cpu(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
memory = MemoryProcess()
owner = Channel(memory.socket)
owner.send({"type": "kv", "block_bytes": 4096, "blocks": 1, "lease_s": 30})
while (message := owner.recv(60)).kind != "listening":
    pass
client = MemoryClient(Channel.connect(os.path.join(memory.run_dir, "memory.sock")), "bench")
client.claim("r", 0)
time.sleep(0.05)  # it has all its imports, too
started, used = time.monotonic(), cpu()
before = service_cpu(memory.child.pid)
owner.send({"type": "load", "model": path, **options})
plan, weights, _ = client.wait_arenas()
client.wait_stage(len(plan.stages) - 1)
for run in (run for stage in plan.stages for extent in stage.extents for run in extent.runs):
    bytes(weights.view(run.arena_offset, run.length)[::4096])
seconds, used = time.monotonic() - started, cpu() - used
while (message := owner.recv(60)).kind not in ("loaded", "failed"):
    pass
if message.kind == "failed":
    sys.exit(str(message.body["error"]))
used += service_cpu(memory.child.pid) - before
spans = message.body["spans"]
verified = message.body["verified"]
ready = max(s[3] for s in spans if s[0].startswith("stage_ready["))
owner.close()
memory.child.wait()
streaming = next(s[2] for s in spans if s[0].startswith("weight_"))
first = next(s[3] for s in spans if s[0] == "stage_ready[0]")
resident = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
report(seconds, plan.read_bytes, used,
       late=(first - streaming) / (ready - streaming) - plan.stages[0].nbytes / plan.read_bytes,
       beside=resident - plan.arena_bytes if resident > plan.arena_bytes else resident,
       verified=verified)
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
from runai_model_streamer import SafetensorsStreamer, list_safetensors
started, used = time.perf_counter(), cpu()
files = files or list_safetensors(path + "/")
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
from coldframe.loader.arena import round_up
from coldframe.loader.devices import open_device
from coldframe.loader.sources.direct import open_direct
block, piece = 4096, 8 << 20
sizes = [round_up(os.path.getsize(file), block) for file in files]
fds = [open_direct(file) for file in files]
if None in fds:
    sys.exit("the file system refuses O_DIRECT")
total = sum(round_up(size, 2 << 20) for size in sizes)
started, used = time.perf_counter(), cpu()
arena = open_device("cpu").arena("raw", total, now=True)
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
        if os.preadv(fd, [view[to : to + length]], at) <= 0:
            sys.exit("a short read")
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report(time.perf_counter() - started, sum(sizes), cpu() - used)
"""

# Options may name the files and their sizes: no server needs to be asked for them then.
_RAW_SOCKETS = """
import socket, threading, urllib.request
from urllib.parse import urlsplit
from coldframe.loader.arena import round_up
from coldframe.loader.devices import open_device
parts, piece = urlsplit(path), 16 << 20
sizes = options.get("sizes", {})
if not sizes:
    index = urllib.request.urlopen(path + "/model.safetensors.index.json")
    for name in sorted(set(json.load(index)["weight_map"].values())):
        head = urllib.request.Request(path + "/" + name, method="HEAD")
        sizes[name] = int(urllib.request.urlopen(head).headers["Content-Length"])
jobs, base = [], 0
for name, size in sizes.items():
    jobs += [(name, at, base + at, min(piece, size - at)) for at in range(0, size, piece)]
    base += round_up(size, 4096)
started, used = time.perf_counter(), cpu()
arena = open_device("cpu").arena("raw", base, now=True)
view, left, lock = arena.view(), iter(jobs), threading.Lock()
def read():
    connection = socket.create_connection((parts.hostname, parts.port))
    while True:
        with lock:
            job = next(left, None)
        if job is None:
            return
        name, at, to, length = job
        connection.sendall((f"GET {parts.path}/{name} HTTP/1.1\\r\\nHost: x\\r\\n"
                            f"Range: bytes={at}-{at + length - 1}\\r\\n\\r\\n").encode())
        head = b""
        while not head.endswith(b"\\r\\n\\r\\n"):
            if not (byte := connection.recv(1)):
                os._exit(1)
            head += byte
        if not head.startswith(b"HTTP/1.1 206"):
            os.write(2, head.partition(b"\\r")[0])
            os._exit(1)
        while length:
            count = connection.recv_into(view[to : to + length], 0, socket.MSG_WAITALL)
            if not count:
                os._exit(1)
            to, length = to + count, length - count
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report(time.perf_counter() - started, sum(job[3] for job in jobs), cpu() - used)
"""

LOADERS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "coldframe": (_COLDFRAME, {}, {}),
    "coldframe --copy": (_COLDFRAME, {"copy": True}, {}),
    "coldframe at 1 GB/s": (_COLDFRAME, {"throttle": 1e9}, {}),
    "coldframe sealed at 1 GB/s": (_COLDFRAME, {"throttle": 1e9}, {}),
    "coldframe sealed": (_COLDFRAME, {"copy": True}, {}),
    "raw O_DIRECT": (_RAW, {}, {}),
    "raw sockets": (_RAW_SOCKETS, {}, {}),
    "safetensors": (_SAFETENSORS, {}, {}),
    "runai": (_RUNAI, {}, {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}),
    "runai io_uring": (_RUNAI, {}, {"RUNAI_STREAMER_FS_STRATEGY": "io_uring_direct"}),
    "runai s3": (_RUNAI, {}, {}),
    "fastsafetensors": (_FASTSAFETENSORS, {}, {}),
}
"""Script, options of ours, and environment by name."""


def load_once(
    name: str,
    model: str,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
    limit_s: float | None = None,
) -> dict[str, Any]:
    """Runs one loader once.

    Args:
        name: One of `LOADERS`.
        model: The checkpoint's directory or URI.
        python: The interpreter that has the loader installed.
        environment: What the loader finds in its environment besides.
        more: Options besides its own.
        limit_s: Seconds that it may take, or None.

    Raises:
        PlatformError: It failed, did not end, or is not installed there.
    """
    script, options, its_own = LOADERS[name]
    given = json.dumps({**options, **(more or {})})
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-c", _PROLOGUE + script, model, given],
            env={**os.environ, **its_own, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            "a loader did not end", where=f"{name}: {model}", expected=f"within {limit_s:g} s"
        ) from error
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PlatformError("a loader failed", where=f"{name}: {model}", got=last)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
