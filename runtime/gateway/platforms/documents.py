"""What routes answer that ask for no tokens: health, and the protocols' small documents."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from coldframe.runtime.gateway.platforms.kserve import INPUTS, OUTPUTS, VERSION
from coldframe.runtime.gateway.platforms.profile import Route

__all__ = ["KINDS", "document", "our_version"]

KINDS = (
    "health",
    "live",
    "v2-server",
    "v2-live",
    "v2-ready",
    "v2-model",
    "v2-model-ready",
    "cog-health",
)
"""The kinds of route that are answered here."""

_COG = {"starting": "STARTING", "ready": "READY", "draining": "BUSY", "failed": "SETUP_FAILED"}


def document(
    route: Route, phase: str, models: Mapping[str, str], path: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """The status and the JSON for a route; None stands for no body.

    Args:
        route: One of `KINDS`.
        phase: Of all models together: `starting`, `ready`, `draining` or `failed`.
        models: The phase of each, by the name that it is served by.
        path: The parameters of the route.
    """
    path = path or {}
    model = path.get("model", "")
    if route.kind.startswith("v2-model"):
        version = path.get("version", VERSION)
        if model not in models or version != VERSION:
            return 404, {"error": f"there is no model {model!r:.100}, version {version!r:.100}"}
        phase = models[model]
    ready = phase == "ready"
    # 204 says that it will be: only while that is so. A container that drains or has failed is
    # unhealthy everywhere.
    status = 200 if ready else route.loading if phase == "starting" else 503
    match route.kind:
        case "health":
            return status, None if status == 204 else {"status": phase}
        case "live":
            return 200, {"status": "live"}
        case "v2-server":
            return 200, {"name": "coldframe", "version": our_version(), "extensions": []}
        case "v2-live":
            return 200, {"live": True}
        case "v2-ready":
            return status, {"live": True, "ready": ready}
        case "v2-model-ready":
            return status, {"name": model, "ready": ready}
        case "v2-model":
            return 200, {
                "name": model,
                "versions": [VERSION],
                "platform": "coldframe",
                "inputs": list(INPUTS),
                "outputs": list(OUTPUTS),
            }
        case "cog-health":
            setup = {"ready": "succeeded", "failed": "failed"}.get(phase, "starting")
            if phase == "draining":
                setup = "succeeded"
            return 200, {"status": _COG[phase], "setup": {"status": setup, "logs": ""}}
    raise ValueError(f"{route!r} is answered elsewhere")


@functools.cache
def our_version() -> str:
    """The installed version of this package."""
    from importlib.metadata import version

    return version("coldframe")
