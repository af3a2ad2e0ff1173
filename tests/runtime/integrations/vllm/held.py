"""A checkpoint over HTTP whose weights come as far as a test lets them."""

from __future__ import annotations

import json
import re
import threading
from bisect import bisect_right
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from coldframe.loader.checkpoints.stages import stage_of_each

_PIECE = 16 << 10


class Held:
    """Serves a directory on loopback; what asks for a shard's header gets it.

    Args:
        model: The checkpoint.
        upto: The last stage whose weights are sent; further ones are held back.

    Attributes:
        url: What to load from.
        stages: How many there are.
    """

    def __init__(self, model: Path, upto: int = -1) -> None:
        self.model = model
        self.gone = False
        self._upto = upto
        self._begins = _begins(model)
        self.stages = 1 + max(stage for found in self._begins.values() for _, stage in found)
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

    def release(self, upto: int | None = None) -> None:
        """Lets the weights of stages up to this one through; all, where none is named."""
        with self._changed:
            self._upto = self.stages if upto is None else upto
            self._changed.notify_all()

    def vanish(self) -> None:
        """From now on there is nothing here, and what was being sent breaks off."""
        with self._changed:
            self.gone = True
            self._changed.notify_all()

    def may_send(self, shard: str, at: int) -> bool:
        """Waits until a byte of weights may go; False where it never will."""
        begins = self._begins[shard]
        stage = begins[bisect_right(begins, (at, self.stages)) - 1][1]
        with self._changed:
            self._changed.wait_for(lambda: self.gone or stage <= self._upto)
            return not self.gone


def _begins(model: Path) -> dict[str, list[tuple[int, int]]]:
    """Of each shard, where each tensor begins and its stage."""
    places = {}
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        base = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:base]).items():
            if name != "__metadata__":
                places[name] = path.name, base + tensor["data_offsets"][0]
    stages, _ = stage_of_each(list(places), where=str(model))
    found: dict[str, list[tuple[int, int]]] = {}
    for name, (shard, begin) in places.items():
        found.setdefault(shard, []).append((begin, stages[name]))
    return {shard: sorted(begins) for shard, begins in found.items()}


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
        held_back = path.suffix == ".safetensors" and start > int.from_bytes(data[:8], "little")
        for at in range(start, end, _PIECE):
            if held_back and not held.may_send(path.name, at):
                self.close_connection = True
                return
            self.wfile.write(data[at : min(at + _PIECE, end)])
