"""New connections: straight to the server, or through the proxy that the environment names."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldframe.loader.errors import PlatformError, SourceProtocol, SourceUntrusted
from coldframe.loader.web.address import Target
from coldframe.loader.web.broken import Broken, reason_of
from coldframe.loader.web.connection import Connection
from coldframe.loader.web.head import Garbled
from coldframe.loader.web.limits import Limits

if TYPE_CHECKING:
    import ssl

__all__ = ["Dialler", "host_header"]

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class _Proxy:
    host: str
    port: int
    headers: dict[str, str] = field(repr=False)


class Dialler:
    """Makes connections. Safe for several threads.

    Args:
        limits: How long that may take.
        ca_file: Certificates to trust in place of the system's (which `SSL_CERT_FILE` names); or
            what tells it, asked at the first TLS connection.
    """

    def __init__(
        self, limits: Limits, ca_file: str | Callable[[], str | None] | None = None
    ) -> None:
        self._limits = limits
        self._ca_file = ca_file
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._known: set[str] = set()

    def dial(self, target: Target) -> Connection:
        """A new connection to a request's server.

        Raises:
            Broken: There is none for now.
            SourceUntrusted: The server's certificate is not one to trust.
            SourceProtocol: It speaks no TLS, or a proxy does not let us through.
            PlatformError: The environment names a proxy of an unknown kind.
        """
        limits = self._limits
        proxy = _proxy_for(target)
        sock = self._connect(*((proxy.host, proxy.port) if proxy else (target.host, target.port)))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if target.scheme == "http":
                prefix = f"http://{host_header(target)}" if proxy else ""
                headers = proxy.headers if proxy else None
                return Connection(
                    sock, tls=False, stall_s=limits.stall_s, prefix=prefix, headers=headers
                )
            if proxy is not None:
                _tunnel(sock, proxy, target, limits)
            # From here on the plain socket is an empty shell: what it was is in the TLS one.
            sock = self._secure(sock, target)
            return Connection(sock, tls=True, stall_s=limits.stall_s)
        except BaseException:
            sock.close()
            raise

    def _connect(self, host: str, port: int) -> socket.socket:
        try:
            sock = socket.create_connection((host, port), self._limits.connect_s)
        except socket.gaierror as error:
            # A name that was known a moment ago is: resolvers fail, too.
            unknown = error.errno == socket.EAI_NONAME and host not in self._known
            raise Broken(f"{host}: {reason_of(error)}", hopeless=unknown) from None
        except ConnectionRefusedError:
            raise Broken(f"{host} port {port} refused the connection", slow_down=True) from None
        except OSError as error:
            raise Broken(f"no connection to {host} port {port}: {reason_of(error)}") from None
        self._known.add(host)
        return sock

    def _secure(self, sock: socket.socket, target: Target) -> ssl.SSLSocket:
        import ssl

        sock.settimeout(self._limits.connect_s)
        where = f"https://{host_header(target)}"
        try:
            return self._tls().wrap_socket(sock, server_hostname=target.host)
        except ssl.SSLCertVerificationError as error:
            raise SourceUntrusted(
                "the server's certificate is not trusted", where=where, got=error.verify_message
            ) from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, TimeoutError, ConnectionError) as error:
            raise Broken(f"the TLS handshake broke off: {reason_of(error)}") from None
        except ssl.SSLError as error:
            raise SourceProtocol(
                "the TLS handshake failed",
                where=where,
                expected="a server that speaks TLS 1.2 or later",
                got=error.reason or type(error).__name__,
                hint="Check the URL's scheme and port, and the proxy if there is one.",
            ) from None
        except OSError as error:
            raise Broken(f"the TLS handshake broke off: {reason_of(error)}") from None

    def _tls(self) -> ssl.SSLContext:
        import ssl

        with self._lock:
            if self._context is None:
                path = self._ca_file() if callable(self._ca_file) else self._ca_file
                try:
                    self._context = ssl.create_default_context(cafile=path)
                except OSError as error:
                    raise PlatformError(
                        "the certificates to trust cannot be read",
                        where=path,
                        got=reason_of(error),
                        hint="Name a file of certificates in PEM format.",
                    ) from None
                self._context.set_alpn_protocols(["http/1.1"])
            return self._context


def host_header(target: Target) -> str:
    """The server's name as the `Host` header has it."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == _PORTS[target.scheme] else f"{host}:{target.port}"


def _proxy_for(target: Target) -> _Proxy | None:
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None  # without the import, which takes longer than a request
    from urllib.request import getproxies, proxy_bypass

    found = getproxies()
    url = found.get(target.scheme) or found.get("all")
    if not url or proxy_bypass(f"{target.host}:{target.port}"):
        return None
    return _parse_proxy(url)


def _parse_proxy(url: str) -> _Proxy:
    from base64 import b64encode
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme != "http" or not host:
        raise PlatformError(
            "the environment names a proxy that cannot be used",
            where="http_proxy, https_proxy or all_proxy",
            expected="http://HOST:PORT",
            got=f"{parts.scheme}://...",
        )
    headers = {}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
    return _Proxy(host, port or 80, headers)


def _tunnel(sock: socket.socket, proxy: _Proxy, target: Target, limits: Limits) -> None:
    host = f"[{target.host}]" if ":" in target.host else target.host
    place = f"{host}:{target.port}"
    connection = Connection(sock, tls=False, stall_s=limits.stall_s)
    try:
        connection.send("CONNECT", place, {"Host": place, **proxy.headers})
        status = connection.head().status
    except Garbled as error:
        raise SourceProtocol(
            "the proxy does not answer as one", where=f"{proxy.host}:{proxy.port}", got=error
        ) from None
    if status >= 500:
        raise Broken(f"the proxy {proxy.host} has no connection to {place}", status=status)
    if status >= 300:
        raise SourceProtocol(
            "the proxy does not let us through",
            where=f"{place} through {proxy.host}:{proxy.port}",
            got=f"status {status}",
            hint="Check https_proxy, the credentials in it, and no_proxy.",
        )
