"""Settings that are in the environment and have no flag.

What they mean is said here; that there are all of them, and none that nobody reads, a test sees to
by looking at the sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from docs.generate.flags import twins
from docs.generate.markdown import code, table

__all__ = ["INTERNAL", "OTHERS", "SETTINGS", "named", "others", "read_by_code", "settings"]

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("loader", "snapshot", "runtime", "benchmarks", "images")
_NAME = re.compile(r"\bCOLDFRAME_[A-Z0-9_]*[A-Z0-9]\b")

SETTINGS = {
    "COLDFRAME_API_KEYS": "keys that clients of `serve` must show, set apart by commas or lines",
    "COLDFRAME_API_KEYS_FILE": "a file with such keys",
    "COLDFRAME_CRIU": "the CRIU to use, in place of the one on the `PATH` or of `make criu`",
    "COLDFRAME_EXEC_NS": "when the process was started, in nanoseconds of CLOCK_MONOTONIC: for "
    "whoever measures, and knows that better than the kernel's tick of 10 ms",
    "COLDFRAME_HTTP_TOKEN": "a bearer token for `http(s)://` sources; `TOKEN@HOST` for one of them",
    "COLDFRAME_KV_SECRET": "the secret that replicas which give each other KV have in common",
    "COLDFRAME_KV_SECRET_FILE": "a file with that secret, 16 bytes or more",
    "COLDFRAME_KV_STEP": "by how many bytes KV on a GPU grows at once (256 MiB)",
    "COLDFRAME_MODEL": "MODEL of `serve` where none is named; several, set apart by commas",
    "COLDFRAME_NODE_KEY": "the key that `plan --node` shows to endpoints; a file of nodes may name "
    "another variable that begins with `COLDFRAME_`",
    "COLDFRAME_NVIDIA_PROC": "a folder that says what `/proc/driver/nvidia` would",
    "COLDFRAME_PEER_TOKEN": "the secret that replicas which give each other weights have in common",
    "COLDFRAME_RUN_DIR": "where a replica makes its private directory (the first of "
    "`XDG_RUNTIME_DIR`, `TMPDIR` and `/tmp` that can be written to and whose path leaves room for "
    "sockets)",
    "COLDFRAME_S3_UNSIGNED": "`1` for public buckets: no credentials are looked for, nothing is "
    "signed",
}
"""What people set, and what for."""

INTERNAL = {"COLDFRAME_BUILD", "COLDFRAME_WORKER_CORES"}
"""What processes of a replica tell their children; nobody else sets them."""

OTHERS = {
    "AWS_*": "credentials, region and endpoint of S3, as boto3 reads them, and `AWS_REGION` "
    "([S3](sources.md#s3))",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are for us; `--device auto` looks at it, too",
    "CXX": "the C++ compiler that decode steps are compiled with (`g++`)",
    "DYN_*": "how a worker is known to NVIDIA Dynamo ([Dynamo](dynamo.md#how-it-is-known)), and "
    "what Dynamo's own runtime reads",
    "ETCD_*": "what opens Dynamo's discovery: for `worker --dynamo` alone",
    "HF_ENDPOINT": "the hub's address, for mirrors",
    "HF_HOME": "where the hub's cache and token are; `HF_HUB_CACHE` and `HF_TOKEN_PATH` for one of "
    "them",
    "HF_HUB_OFFLINE": "`1`: only the local cache; so with `TRANSFORMERS_OFFLINE`",
    "HF_TOKEN": "for gated and private repositories; `HF_HUB_DISABLE_IMPLICIT_TOKEN=1` sends none",
    "NATS_*": "what opens Dynamo's queues: for `worker --dynamo` alone",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "switches tracing on, with OpenTelemetry's other variables",
    "POD_IP": "by which address others reach this replica, where it listens at all of them",
    "SSL_CERT_FILE": "certificates to trust in place of the system's",
    "XDG_CACHE_HOME": "where images, compiled steps and a plan's rates are kept (`~/.cache`)",
    "XDG_RUNTIME_DIR": "where the run directory is made, unless `COLDFRAME_RUN_DIR` says it",
    "https_proxy": "and `http_proxy`, `no_proxy`: the way to sources on a network",
}
"""Variables that are not ours, and are read all the same. The platforms' own are in their table."""


def settings() -> str:
    """A table of our own."""
    return table(["variable", ""], ([code(n), told] for n, told in sorted(SETTINGS.items())))


def others() -> str:
    """A table of those of others."""
    rows = sorted(OTHERS.items(), key=lambda item: item[0].lower())
    return table(["variable", ""], ([code(n), told] for n, told in rows))


def read_by_code() -> set[str]:
    """Variables of ours that the sources name and that are no flag's twin."""
    found = {name for text in _sources() for name in _NAME.findall(text)}
    return {name for name in found if not name.startswith("COLDFRAME_TEST_")} - twins()


def named(name: str) -> bool:
    """Whether the sources name a variable; `AWS_*` is any of those that begin so."""
    wanted = re.escape(name).replace(r"\*", "([A-Z]|\\b)")
    return any(re.search(rf"\b{wanted}", text, re.IGNORECASE) for text in _sources())


def _sources() -> Iterator[str]:
    for folder in _FOLDERS:
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh"):
                yield path.read_text(encoding="utf-8")
