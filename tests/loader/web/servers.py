"""Real servers on loopback, and a proxy that makes them fail as networks and stores do.

    with nginx(root) as base:                      # http://127.0.0.1:PORT
        with FaultProxy(base) as proxy:
            proxy.faults = [None, Fault(cut_after=1000)]     # one for each request, then none
            ... proxy.url ...
            assert proxy.log[1].headers["range"] == "bytes=0-99"

No port is fixed, and nothing that is started here outlives its `with`.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import trustme

from tests.support import unavailable

__all__ = ["Fault", "FaultProxy", "Request", "nginx"]

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection", "te"}

# One worker under a master: without one, nginx 1.22 crashes on a socket that it inherits.
_NGINX = """
daemon off;
{user}
worker_processes 1;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 512; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_body_temp_path {prefix}/body;
  proxy_temp_path {prefix}/proxy;
  fastcgi_temp_path {prefix}/fastcgi;
  uwsgi_temp_path {prefix}/uwsgi;
  scgi_temp_path {prefix}/scgi;
  default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{port}{ssl};
    root "{root}";
    {tls}
    {extra}
  }}
}}
"""


@contextmanager
def nginx(root: Path, *, tls: trustme.LeafCert | None = None, extra: str = "") -> Iterator[str]:
    """Serves a folder.

    Args:
        root: The folder.
        tls: A certificate for 127.0.0.1; serves HTTPS with it.
        extra: More lines of its configuration's `server` block, such as `etag off;`.

    Yields:
        The base URL, without a slash at its end.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        unavailable("nginx is not installed")
    with tempfile.TemporaryDirectory(prefix="cf-nginx-") as prefix, socket.socket() as listener:
        # A socket that nginx inherits: nobody else can take its port before it is up, and
        # whoever connects meanwhile waits in its queue.
        listener.bind(("127.0.0.1", 0))
        listener.listen(511)
        port = listener.getsockname()[1]
        lines = ""
        if tls is not None:
            tls.private_key_pem.write_to_path(f"{prefix}/key.pem")
            for pem in tls.cert_chain_pems:
                pem.write_to_path(f"{prefix}/cert.pem", append=True)
            lines = f"ssl_certificate {prefix}/cert.pem; ssl_certificate_key {prefix}/key.pem;"
        config = Path(prefix, "nginx.conf")
        config.write_text(
            _NGINX.format(
                prefix=prefix,
                port=port,
                root=root.resolve(),
                user="user root;" if os.geteuid() == 0 else "",
                ssl=" ssl" if tls else "",
                tls=lines,
                extra=extra,
            )
        )
        process = subprocess.Popen(
            [program, "-p", prefix, "-c", str(config), "-e", f"{prefix}/error.log"],
            pass_fds=[listener.fileno()],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
        )
        try:
            listener.close()
            _wait_until_served(port, Path(prefix, "error.log"))
            yield f"http{'s' if tls else ''}://127.0.0.1:{port}"
        finally:
            process.terminate()  # the master ends its worker
            process.wait()


def _wait_until_served(port: int, log: Path) -> None:
    """Until a connection is accepted and answered: a refusal means that nginx has ended."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as probe:
            # An invalid line is answered in plain text with and without TLS.
            probe.sendall(b"?\r\n\r\n")
            probe.recv(1)
    except OSError as error:
        raise RuntimeError(f"nginx did not start: {log.read_text()}") from error


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
        status: Answered in the server's place, with `headers` and `body`.
        headers: Replace the answer's own; None takes one away.
        body: See `status`.
        cut_after: The connection ends after so many bytes of the body.
        reset_after: The same, by a reset.
        stall_after: Nothing comes for `stall_s` after so many bytes, or until the proxy ends.
        stall_s: Seconds.
        head_delay_s: Seconds before the answer begins.
        flip_at: The byte at this offset of the body is inverted.
        whole: The range asked for is ignored: 200 with the whole file.
        trickle: (bytes, seconds): so many bytes at a time, with a pause after each.
        close: The connection is closed after the answer although nothing says so: what a server
            does to a connection that was idle for too long.
        silent: The connection is closed in the answer's place.
    """

    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    reset_after: int | None = None
    stall_after: int | None = None
    stall_s: float = 3600.0
    head_delay_s: float = 0.0
    flip_at: int | None = None
    whole: bool = False
    trickle: tuple[int, float] | None = None
    close: bool = False
    silent: bool = False


@dataclass
class Request:
    """A request that the proxy saw.

    Attributes:
        method: `GET`, or `CONNECT` where it was used as a forward proxy.
        path: As it stood in the request.
        headers: With names in lower case.
        connection: The number of the connection that it came on, from 0.
        status: What was answered; 0 until then.
        sent: Bytes of the body that went out.
        time: When it came, in monotonic seconds.
    """

    method: str
    path: str
    headers: dict[str, str]
    connection: int
    status: int = 0
    sent: int = 0
    time: float = field(default_factory=time.monotonic)

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for."""
        text = self.headers.get("range")
        if text is None:
            return None
        first, last = text.removeprefix("bytes=").split("-")
        return int(first), int(last)


Script = Callable[[Request], Fault | None]


class FaultProxy:
    """A server before a server, that fails when it is told to. A context manager.

    Asked as a forward proxy it works too: an absolute URL is fetched from where it says, and
    `CONNECT` gives a tunnel; faults apply to the former.

    Args:
        upstream: The base URL of the server behind it, `http://`.
        faults: One for each request, in the order in which they come, None for none; or a
            function of the request. May be set anew at any time.
        tls: A certificate for 127.0.0.1; the proxy itself then speaks HTTPS.

    Attributes:
        url: Its base URL, without a slash at its end.
        log: The requests that it saw.
    """

    def __init__(
        self,
        upstream: str,
        faults: list[Fault | None] | Script | None = None,
        *,
        tls: trustme.LeafCert | None = None,
    ) -> None:
        self.upstream = upstream
        self.faults: list[Fault | None] | Script = [] if faults is None else faults
        self.log: list[Request] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._connections = 0
        self._open: set[socket.socket] = set()
        self._context: ssl.SSLContext | None = None
        if tls is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.configure_cert(self._context)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # waits for the threads of its connections

    def opened(self, connection: socket.socket) -> tuple[socket.socket, int]:
        with self._lock:
            number = self._connections
            self._connections += 1
            self._open.add(connection)
        if self._context is not None:
            wrapped = self._context.wrap_socket(connection, server_side=True)
            with self._lock:
                self._open.discard(connection)
                self._open.add(wrapped)
            connection = wrapped
        return connection, number

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)

    def came(self, request: Request) -> Fault:
        with self._lock:
            self.log.append(request)
            if callable(self.faults):
                return self.faults(request) or Fault()
            return (self.faults.pop(0) if self.faults else None) or Fault()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        self.proxy = self.server.proxy
        self.raw = self.request
        try:
            self.request, self.number = self.proxy.opened(self.request)
        except OSError:
            self.proxy.closed(self.raw)
            raise
        super().setup()

    def finish(self) -> None:
        self.proxy.closed(self.request)
        with suppress(OSError):
            super().finish()
        # `shutdown_request` of the server has the bare socket, which TLS has taken over.
        if self.request is not self.raw:
            self.request.close()

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.number)
        fault = self.proxy.came(request)
        length = int(headers.get("content-length", 0))
        sent = self.rfile.read(length) if length else None
        if self.proxy.ended.wait(fault.head_delay_s) or fault.silent:
            self.close_connection = True
            return
        if fault.status is None:
            status, answer, body = self._ask(request, fault, sent)
        else:
            status, answer, body = (
                fault.status,
                {"content-length": str(len(fault.body))},
                fault.body,
            )
        for name, value in fault.headers.items():
            answer.pop(name.lower(), None)
            if value is not None:
                answer[name] = value
        if fault.flip_at is not None:
            at = fault.flip_at
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        request.status = status
        with suppress(OSError):
            self._answer(request, fault, status, answer, body)
            return
        self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _ask(
        self, request: Request, fault: Fault, sent: bytes | None
    ) -> tuple[int, dict[str, str], bytes]:
        absolute = request.path.startswith("http://")
        url = urlsplit(request.path if absolute else self.proxy.upstream)
        assert url.hostname is not None
        path = request.path
        if absolute:
            path = url.path + (f"?{url.query}" if url.query else "")
        headers = {k: v for k, v in request.headers.items() if k not in _HOP_BY_HOP}
        if fault.whole:
            headers.pop("range", None)
        upstream = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=60)
        try:
            upstream.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(sent)
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        found = {k.lower(): v for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP}
        if self.command != "HEAD":
            found["content-length"] = str(len(body))
        return answer.status, found, body

    def _answer(
        self, request: Request, fault: Fault, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        reason = http.client.responses.get(status, "")
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{k}: {v}" for k, v in headers.items())]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if self.command == "HEAD":
            return
        if fault.cut_after is not None:
            self._send(request, fault, body[: fault.cut_after])
            self.close_connection = True
        elif fault.reset_after is not None:
            self._send(request, fault, body[: fault.reset_after])
            # Else the reset may overtake what was sent before it.
            time.sleep(0.05)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif fault.stall_after is not None:
            self._send(request, fault, body[: fault.stall_after])
            self.proxy.ended.wait(fault.stall_s)
            self._send(request, fault, body[fault.stall_after :])
        else:
            self._send(request, fault, body)
        if fault.close:
            self.close_connection = True

    def _send(self, request: Request, fault: Fault, body: bytes) -> None:
        size, pause = fault.trickle or (len(body) or 1, 0.0)
        for start in range(0, len(body), size):
            piece = body[start : start + size]
            # Counted first: whoever has received it may look at once.
            request.sent += len(piece)
            try:
                self.connection.sendall(piece)
            except OSError:
                request.sent -= len(piece)
                raise
            if self.proxy.ended.wait(pause):
                return

    def do_CONNECT(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request("CONNECT", self.path, headers, self.number)
        fault = self.proxy.came(request)
        self.close_connection = True
        if fault.status is not None:
            request.status = fault.status
            self._answer(request, fault, fault.status, {"content-length": "0"}, b"")
            return
        host, port = self.path.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as upstream:
            self.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            request.status = 200
            back = threading.Thread(target=_pump, args=(upstream, self.connection))
            back.start()
            _pump(self.connection, upstream)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Until either side ends; then both do."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
