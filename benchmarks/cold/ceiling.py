"""What the path itself can do: the same files read by as little as possible, in the same round.

From a disk that is a read past the page cache by eight threads; from a server, a read from eight
sockets into memory that nobody parses. Interpreter and imports are not in the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from coldframe.benchmarks.cold.sources import Place, weight_files
from coldframe.benchmarks.harness import evict_files
from coldframe.benchmarks.loaders import load_once
from coldframe.loader.errors import PlatformError

__all__ = ["DIRECT", "SOCKETS", "ceiling_rate"]

DIRECT = "a raw O_DIRECT read of the same files"
SOCKETS = "a raw read of the same files from sockets"
_LIMIT_S = 600.0
_PIECE = 16 << 20
_SCRIPT = """
import json, os, socket, sys, threading, time
from coldframe.loader.arena import round_up
from coldframe.loader.devices import open_device
host, port, files, piece = json.loads(sys.argv[1])
jobs, base = [], 0
for path, size in files:
    jobs += [(path, at, base + at, min(piece, size - at)) for at in range(0, size, piece)]
    base += round_up(size, 4096)
total = sum(job[3] for job in jobs)
started = time.perf_counter()
view = open_device("cpu").arena("raw", base, now=True).view()
left, lock = iter(jobs), threading.Lock()
def read():
    connection = socket.create_connection((host, port))
    while True:
        with lock:
            job = next(left, None)
        if job is None:
            return
        path, at, to, length = job
        connection.sendall((f"GET {path} HTTP/1.1\\r\\nHost: x\\r\\n"
                            f"Range: bytes={at}-{at + length - 1}\\r\\n\\r\\n").encode())
        head = b""
        while not head.endswith(b"\\r\\n\\r\\n"):
            head += connection.recv(1)
        if not head.startswith(b"HTTP/1.1 206"):
            sys.stderr.write(head.decode("latin-1"))
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
print(json.dumps(total / (time.perf_counter() - started)))
"""


def ceiling_rate(place: Place, model: Path) -> float:
    """Measures the rate of a path once, in bytes a second.

    Args:
        place: Where the weights are.
        model: The same checkpoint's directory, by which its files are known.

    Raises:
        PlatformError: The path cannot be measured: no O_DIRECT, no eviction, no such file there.
    """
    if place.base is None:
        evict_files(weight_files(model))
        read = load_once("raw O_DIRECT", str(model))
        return float(read["bytes"] / read["seconds"])
    parts = urlsplit(place.base)
    files = [(f"{parts.path}/{file.name}", file.stat().st_size) for file in weight_files(model)]
    asked = json.dumps([parts.hostname, parts.port, files, _PIECE])
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, asked],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise PlatformError(
            "a raw read did not end", where=place.base, expected=f"within {_LIMIT_S:g} s"
        ) from error
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise PlatformError("a raw read failed", where=place.base, got=last)
    return float(json.loads(done.stdout))
