"""A checkpoint over HTTP whose weights come as far as a test lets them."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

_PIECE = 16 << 10


class Held:
    """Serves a directory on loopback.

    Args:
        model: The checkpoint.
        may_pass: Bytes of weights that are sent before all further ones are held back.

    Attributes:
        url: What to load from.
        weights_bytes: Of its weight files.
    """

    def __init__(self, model: Path, may_pass: int = 0) -> None:
        self.model = model
        self.weights_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        self.passed = 0
        self.gone = False
        self._limit: float = may_pass
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.held = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.vanish()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def release(self, may_pass: float = float("inf")) -> None:
        """Lets so many bytes through in all."""
        with self._changed:
            self._limit = may_pass
            self._changed.notify_all()

    def vanish(self) -> None:
        """From now on there is nothing here, and what was being sent breaks off."""
        with self._changed:
            self.gone = True
            self._changed.notify_all()

    def may_send(self, nbytes: int) -> bool:
        """Waits until bytes of weights may go; False where they never will."""
        with self._changed:
            self._changed.wait_for(lambda: self.gone or self.passed + nbytes <= self._limit)
            self.passed += nbytes
            return not self.gone


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        held: Held = self.server.held  # type: ignore[attr-defined]
        path = held.model / self.path.lstrip("/").partition("?")[0]
        if held.gone or not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2] or len(data)) + 1, len(data)) if wanted else len(data)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not body:
            return
        weights = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else None
        for at in range(start, end, _PIECE):
            piece = data[at : min(at + _PIECE, end)]
            # A shard's header is no weights: without it there would be no plan.
            if weights is not None and at >= weights and not held.may_send(len(piece)):
                self.close_connection = True
                return
            self.wfile.write(piece)

