"""RunPod's queue: the SDK fetches jobs, this hands each to the gateway over the loopback.

The gateway listens and holds requests from the first moment, so jobs may be taken while the
replica is still cold. A job that is cancelled closes its connection, which frees all that it
holds. Needs the extra `runpod`; aiohttp comes with it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import PlatformError
from coldframe.loader.process import collect_garbage
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Requests
from coldframe.runtime.gateway.platforms.jobs import JobAdapter, tokens
from coldframe.runtime.gateway.platforms.parameters import choice_text

if TYPE_CHECKING:
    from aiohttp import ClientResponse

__all__ = ["Job", "job_handler", "main"]

Job = dict[str, Any]

_PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
_END = b"[DONE]"

_SETTINGS = {
    # At the SDK's own default, DEBUG, every answer is in the log.
    "RUNPOD_LOG_LEVEL": "INFO",
    # The SDK's checks make a CUDA context of their own before the first job is fetched; the
    # replica finds out itself what its device can do.
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
}


def main(url: str, api_key: str | None = None, concurrency: int = 16) -> None:
    """Fetches and answers jobs until SIGTERM; those that run are finished.

    The SDK reads its own flags from `sys.argv` (`--rp_serve_api` serves jobs locally, for tests).

    Args:
        url: Of the gateway, as `http://127.0.0.1:8080`.
        api_key: One that the gateway takes, where it wants one.
        concurrency: Jobs at once. What exceeds what the workers take waits in the gateway.

    Raises:
        PlatformError: The SDK is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import runpod  # type: ignore[import-untyped]
    except ImportError as error:
        raise PlatformError(
            "RunPod's queue needs its SDK",
            where="import runpod",
            got=str(error),
            hint="Install it with `pip install coldframe[runpod]`.",
        ) from error
    collect_garbage()  # a child of the front starts without a collector
    runpod.serverless.start(
        {
            "handler": job_handler(url, api_key),
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda current: concurrency,
        }
    )


def job_handler(url: str, api_key: str | None = None) -> Callable[[Job], AsyncIterator[object]]:
    """The handler that the SDK calls for each job: an async generator of outputs.

    Args:
        url: Of the gateway.
        api_key: One that the gateway takes.
    """

    closing: set[asyncio.Future[None]] = set()

    async def handle(job: Job) -> AsyncIterator[object]:
        outputs = _outputs(url, api_key, job.get("input"))

        def close(_: object) -> None:
            closed = asyncio.ensure_future(outputs.aclose())
            closing.add(closed)
            closed.add_done_callback(closing.discard)

        # A job that is stopped while the SDK sends an output leaves this generator where it is,
        # until the collector comes by. The gateway must not go on for so long.
        owner = asyncio.current_task()
        if owner is not None:
            owner.add_done_callback(close)
        try:
            async for output in outputs:
                yield output
        except ApiError as error:
            # The SDK takes this for the end of a job that failed.
            yield {"error": error.message}
        finally:
            if owner is not None:
                owner.remove_done_callback(close)

    return handle


async def _outputs(url: str, api_key: str | None, given: object) -> AsyncGenerator[object, None]:
    if isinstance(given, dict) and given.get("openai_route") == "/v1/models":
        async with _asked(url, api_key, "/v1/models", None) as response:
            yield await response.json()
        return
    adapter = JobAdapter()
    requests = adapter.read(given)
    kind, body = requests.items[0]
    async with _asked(url, api_key, _PATHS[kind], body) as response:
        if not requests.stream:
            yield adapter.write(requests, [await response.json()])
            return
        async for events in _batches(response):
            async for output in _streamed(requests, events):
                yield output


async def _streamed(requests: Requests, events: list[bytes]) -> AsyncIterator[object]:
    """What a batch of events is to the platform: OpenAI's clients get them as they are."""
    if requests.shape == "openai":
        yield b"".join(event + b"\n\n" for event in events).decode()
    chunks = [json.loads(data) for data in map(_data, events) if data not in (b"", _END)]
    if requests.shape != "openai":
        texts: dict[int, list[str]] = {}
        for chunk in chunks:
            for choice in chunk.get("choices", ()):
                if choice_text(choice):
                    texts.setdefault(int(choice["index"]), []).append(choice_text(choice))
        if texts or any(chunk.get("usage") for chunk in chunks):
            yield tokens(texts, chunks)
    for chunk in chunks:
        if "error" in chunk:
            raise _error(500, chunk)


async def _batches(response: ClientResponse) -> AsyncIterator[list[bytes]]:
    """Server-sent events, all that have come since the last were taken.

    Each output is a request to the platform of its own. While one is on its way the next tokens
    gather in the connection's buffer: the first goes out at once, none waits for a batch to fill.
    """
    rest = b""
    ended = False
    while data := await response.content.readany():
        *events, rest = (rest + data).split(b"\n\n")
        if events:
            ended = _data(events[-1]) == _END
            yield events
    if not ended:
        raise ApiError(502, "The answer broke off.", kind="server_error")


@asynccontextmanager
async def _asked(
    url: str, api_key: str | None, path: str, body: Mapping[str, Any] | None
) -> AsyncIterator[ClientResponse]:
    """The gateway's answer to a body, or to a GET where there is none.

    Raises:
        ApiError: It refuses, or cannot be reached.
    """
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # How long an answer may take is the gateway's to say.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    method = "GET" if body is None else "POST"
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.request(method, url.rstrip("/") + path, json=body) as response,
        ):
            if response.status != 200:
                raise _error(response.status, await _json(response))
            yield response
    except (aiohttp.ClientError, OSError) as error:
        message = f"The replica cannot be reached: {error}"
        raise ApiError(502, message, kind="server_error") from error


async def _json(response: ClientResponse) -> object:
    try:
        return json.loads(await response.read())
    except ValueError:
        return None


def _data(event: bytes) -> bytes:
    return event.removeprefix(b"data:").strip()


def _error(status: int, document: object) -> ApiError:
    told = document.get("error") if isinstance(document, dict) else None
    message = told.get("message") if isinstance(told, dict) else None
    return ApiError(status, str(message or f"The replica answered with status {status}."))
