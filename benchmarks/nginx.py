"""nginx on loopback: the server that network loads are measured against.

It serves a model's directory as plain HTTP and, at the same paths, as a bucket of S3: objects have
path-style addresses, and a listing gets a fixed answer. It does not check signatures.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from coldframe.benchmarks.interruption import end, guarded, unbroken
from coldframe.loader.errors import PlatformError

__all__ = ["BUCKET", "serve"]

BUCKET = "models"
_START_S = 10.0

_CONFIG = """
daemon off;
master_process off;
pid {scratch}/pid;
error_log {scratch}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    sendfile_max_chunk 2m;
    keepalive_requests 100000;
    client_body_temp_path {scratch}/body;
    proxy_temp_path {scratch}/proxy;
    fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi;
    scgi_temp_path {scratch}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location = /{bucket} {{ default_type application/xml; alias {scratch}/list.xml; }}
        location = /{bucket}/ {{ default_type application/xml; alias {scratch}/list.xml; }}
        location /{bucket}/model/ {{ default_type application/octet-stream; alias {model}/; }}
    }}
}}
"""


@contextmanager
def serve(model: Path) -> Iterator[str]:
    """Serves a directory while the context lasts.

    Args:
        model: The directory; its files are at `URL/models/model/NAME`.

    Returns:
        The server's URL, without a path.

    Raises:
        PlatformError: nginx is not installed, or does not start.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise PlatformError(
            "nginx is not installed", hint="Install it, for example by apt-get install nginx-light."
        )
    with tempfile.TemporaryDirectory(prefix="coldframe-nginx-") as scratch:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        Path(scratch, "list.xml").write_text(_listing(model))
        config = Path(scratch, "nginx.conf")
        config.write_text(
            _CONFIG.format(scratch=scratch, port=port, bucket=BUCKET, model=model.resolve())
        )
        command = [program, "-p", scratch, "-e", f"{scratch}/error.log", "-c", str(config)]
        server: subprocess.Popen[bytes] | None = None
        with guarded() as watch:
            try:
                with unbroken():
                    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                    watch(server.pid)
                _wait(port, server, Path(scratch, "error.log"))
                yield f"http://127.0.0.1:{port}"
            finally:
                if server is not None:
                    end(server, group=False)


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    said = log.read_text().strip().splitlines() if log.exists() else []
    raise PlatformError("nginx does not start", got=said[-1] if said else "no word")


def _listing(model: Path) -> str:
    """The answer to ListObjectsV2, whatever was asked."""
    files = sorted(path for path in model.iterdir() if path.is_file())
    contents = "".join(
        f"<Contents><Key>model/{escape(path.name)}</Key>"
        "<LastModified>2025-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"0"</ETag><Size>{path.stat().st_size}</Size>'
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for path in files
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>model/</Prefix><KeyCount>{len(files)}</KeyCount>"
        f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    )
