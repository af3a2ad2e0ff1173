"""A memory service of a host, with one worker: what it has written, or what it has brought."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.transport.base import DEFAULT_WAYS
from tests.loader.memory_service.test_service import Service, until

__all__ = ["BLOCK", "BLOCKS", "SECRET", "Side"]

BLOCK = 60_000
BLOCKS = 32
SECRET = "the secret of these two services"


class Side(Service):
    """A service, and one worker."""

    worker: MemoryClient
    address = ""

    def begin(
        self,
        model: Path,
        *,
        ways: tuple[str, ...] = DEFAULT_WAYS,
        listen: str | None = "127.0.0.1:0",
        blocks: int = BLOCKS,
        block_bytes: int = BLOCK,
        lease_s: float = 30.0,
        keyed: bool = False,
    ) -> None:
        self.load(model)
        how = {"advertise": None, "transports": list(ways), "keyed": keyed}
        self.owner.send({"type": "transfer", "listen": listen, **how})
        if listen is not None and "tcp" in ways:
            self.address = self.expect("gives_at").body["address"]
        self.kv(blocks, block_bytes, lease_s)
        self.worker = self.client()
        self.worker.wait_arenas()

    def view(self, block: int, count: int = 1) -> memoryview:
        assert self.worker.kv is not None
        return self.worker.kv.reservation.view()[block * BLOCK : (block + count) * BLOCK]

    def open(self, request: str) -> None:
        self.owner.send({"type": "open", "request": request})

    def assign(self, request: str, count: int, attempt: int = 0) -> Blocks:
        found: list[Blocks] = []

        def ask() -> bool:
            got = self.worker.assign(request, attempt, count) if self.worker.may_assign else None
            found.extend([] if got is None else [got])
            return got is not None

        until(ask)
        return found[0]

    def write(self, request: str, count: int, room: int = 0) -> list[bytes]:
        """A request's blocks, written and let go: what is in them."""
        self.open(request)
        got = self.assign(request, count + room)
        data = [secrets.token_bytes(BLOCK) for _ in range(count)]
        for block, content in zip(got.blocks, data, strict=False):
            self.view(block)[:] = content
        self.worker.publish(request, [])
        self.worker.drop(request)
        return data

    def offer(self, request: str, written: int, ttl_s: float = 30.0) -> Any:
        """A ticket for it."""
        told = {"kv_tokens": written * 32, "fingerprint": "f", "kv_format": "k", "ttl_s": ttl_s}
        body = {"type": "offer", "request": request, "attempt": 0, "written": written, **told}
        self.owner.send(body)
        return self.expect("offered").body["ticket"]

    def bring(self, request: str, ticket: Any, written: int, count: int = 0) -> Blocks:
        """A request's blocks here, once its KV is in them.

        Raises:
            ColdframeError: It is lost.
        """
        self.open(request)
        found: list[Blocks] = []

        def ask() -> bool:
            if self.worker.is_on_its_way(request) or not self.worker.may_assign:
                return False
            got = self.worker.bring(request, 0, max(count, written), written, (), ticket)
            if got is not None:
                found.append(got)
            elif self.worker.lost_why is not None:
                raise self.worker.lost_why
            return got is not None

        until(ask)
        return found[0]

    def start(
        self, request: str, ticket: Any, written: int, by: MemoryClient | None = None
    ) -> None:
        """Begins to bring a request's KV; it is on its way when this returns.

        Who opens it and who brings it have connections of their own, so that it may be asked for
        before the service knows of it: then it is asked for again.
        """
        worker = self.worker if by is None else by
        self.open(request)

        def ask() -> bool:
            if worker.may_assign and not worker.is_on_its_way(request):
                assert worker.bring(request, 0, written, written, (), ticket) is None
                assert worker.lost_why is None
            return worker.is_on_its_way(request)

        until(ask)

    def used(self) -> int:
        self.owner.send({"type": "usage"})
        return int(self.expect("usage").body["kv_used"])

    def over(self) -> tuple[str, bool]:
        body = self.expect("offer_over").body
        return body["request"], body["taken"]
