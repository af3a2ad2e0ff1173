"""A hub of the tests' own, and the server of signed links that it sends large files' readers to.

What it answers is what huggingface.co does; that huggingface_hub can download from it is tested.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["FakeHub", "Repo", "Seen"]

_RESOLVE = re.compile(r"/([^/]+/[^/]+|[^/]+)/resolve/([^/]+)/(.+)")
_CACHED = re.compile(r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)")


@dataclass
class Repo:
    """A repository.

    Attributes:
        commits: Files by commit.
        refs: Commits by branch or tag.
        tokens: Who may read it; None is everybody.
        gated: Those who may not are told that there is a licence, not that there is nothing.
        disabled: Nobody may read it.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tokens: set[str] | None = None
    gated: bool = False
    disabled: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch."""
        content = repr((len(self.commits), sorted(files.items())))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]


class FakeHub:
    """Two servers on loopback: `hub`, and `cdn` for what is large. A context manager.

    Attributes:
        url: The hub's endpoint.
        cdn_url: The other server.
        repos: By name.
        accounts: Tokens that are valid at all.
        small_redirects: Small files are redirected too, within the hub.
        signatures: Of links that are good; empty it, and they have expired.
        hub_log, cdn_log: The requests that came.
        after: Called with each request to the hub once it has been answered.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: set[str] = set()
        self.small_redirects = False
        self.signing = True
        self.signatures: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.hub_log: list[Seen] = []
        self.cdn_log: list[Seen] = []
        self.after: Callable[[Seen], object] = lambda seen: None
        self.numbers = itertools.count()
        self._servers = [_Server(self, _HubHandler), _Server(self, _CdnHandler)]
        self.url, self.cdn_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers
        )
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers
        ]

    def __enter__(self) -> FakeHub:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.end_connections()
            server.server_close()

    def sign(self, blob: bytes) -> tuple[str, str]:
        """The blob's ETag, and a link to it that is good until `signatures` is emptied."""
        etag = hashlib.sha256(blob).hexdigest()
        self.blobs[etag] = blob
        signature = f"SIGNATURE-{next(self.numbers)}"
        if self.signing:
            self.signatures.add(signature)
        return etag, f"{self.cdn_url}/repos/{etag}?X-Amz-Signature={signature}&Policy=x~y"


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: FakeHub, handler: type[_Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self._open: set[_Handler] = set()
        self._lock = threading.Lock()

    daemon_threads = False

    def opened(self, handler: _Handler) -> None:
        with self._lock:
            self._open.add(handler)

    def closed(self, handler: _Handler) -> None:
        with self._lock:
            self._open.discard(handler)

    def end_connections(self) -> None:
        """Those that are kept alive would keep their threads."""
        import socket
        from contextlib import suppress

        with self._lock:
            for handler in self._open:
                with suppress(OSError):
                    handler.connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.opened(self)

    def finish(self) -> None:
        self.server.closed(self)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        return

    def see(self, log: list[Seen]) -> Seen:
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers)
        log.append(seen)
        return seen

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_file(self, content: bytes, etag: str, headers: dict[str, str]) -> None:
        """All of it or a range, if it is still what `If-Match` says."""
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != f'"{etag}"':
            self.answer(412, headers)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self.answer(200, headers, content)
            return
        first = int(found[1])
        last = min(int(found[2] or len(content)), len(content) - 1)
        if first > last:
            self.answer(416, {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, headers, content[first : last + 1])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        seen = self.see(self.server.hub.hub_log)
        self._decide(seen)
        self.server.hub.after(seen)

    def _decide(self, seen: Seen) -> None:
        hub = self.server.hub
        path = urlsplit(seen.path).path
        found = _RESOLVE.fullmatch(path) or _CACHED.fullmatch(path)
        token = seen.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in hub.accounts:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return
        if found is None:
            self._refuse(404, "", "no such page")
            return
        repo = hub.repos.get(found[1])
        if repo is not None and repo.disabled:
            self._refuse(403, "", "Access to this resource is disabled.")
        elif repo is not None and repo.tokens is not None and token not in repo.tokens:
            if repo.gated:
                self._refuse(403 if token else 401, "GatedRepo", "Access is restricted.")
            else:
                self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repo is None:
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            self._give(repo, found[1], unquote(found[2]), unquote(found[3]), _CACHED.match(path))

    def _give(
        self, repo: Repo, name: str, revision: str, file: str, direct: re.Match[str] | None
    ) -> None:
        hub = self.server.hub
        commit = repo.refs.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            self._refuse(404, "EntryNotFound", "Entry not found", headers)
            return
        content = files[file]
        if file.endswith(".safetensors"):
            etag, link = hub.sign(content)
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            self.answer(302, {**headers, "Location": link}, f"Found. {link}".encode())
        elif hub.small_redirects and direct is None:
            link = f"/api/resolve-cache/models/{name}/{commit}/{file}"
            self.answer(307, {**headers, "Location": link}, b"Temporary Redirect")
        else:
            etag = hashlib.sha1(content).hexdigest()
            self.answer_file(content, etag, headers)

    def _refuse(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        found = {**(headers or {}), "X-Error-Message": message}
        if code:
            found["X-Error-Code"] = code
        self.answer(status, found, message.encode())


class _CdnHandler(_Handler):
    def do_GET(self) -> None:
        hub = self.server.hub
        seen = self.see(hub.cdn_log)
        url = urlsplit(seen.path)
        signature = parse_qs(url.query).get("X-Amz-Signature", [""])[0]
        if signature not in hub.signatures:
            self.answer(403, {}, f"<Code>AccessDenied</Code>{signature}".encode())
            return
        etag = url.path.rpartition("/")[2]
        self.answer_file(hub.blobs[etag], etag, {})
