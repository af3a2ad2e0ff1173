"""What the front tells its gateway, once, before that serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["GatewaySettings"]


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How requests are taken.

    Args:
        models: The names that clients call the models by, at least one. The first is meant where
            a request names none, and where a platform's contract has no model in it.
        platform: A profile's name.
        max_running: Sequences of a model that its workers get at once; the others wait in the
            gateway.
        max_waiting: Sequences that may wait for a model; more are refused.
        max_waiting_bytes: Bytes of requests that may be open, of all models together.
        max_wait_s: How long a request may wait for its first token, in seconds.
        max_body: Bytes of a request's body.
        drain_s: How long open requests may take once the end was asked for, in seconds.
        cors: Origins that pages may ask from.
        open_metrics: Whether the metrics are told without a key.
        log_format: `json` or `text`.
        log_level: The least that is logged.
        user: Whom the gateway runs as: an identity's JSON values.
        keys: The API keys; with none, everybody may ask.
        dynamo: How it is registered with Dynamo (`integrations.dynamo.settings`), as JSON values;
            None where it is not.
    """

    models: tuple[str, ...]
    platform: str
    max_running: int = 32
    max_waiting: int = 1024
    max_waiting_bytes: int = 256 << 20
    max_wait_s: float = 300.0
    max_body: int = 8 << 20
    drain_s: float = 25.0
    cors: tuple[str, ...] = ()
    open_metrics: bool = False
    log_format: str = "json"
    log_level: str = "info"
    user: Mapping[str, Any] | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    dynamo: Mapping[str, Any] | None = None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> GatewaySettings:
        lists = {name: tuple(data[name]) for name in ("models", "cors", "keys")}
        return GatewaySettings(**{**data, **lists})
