"""Headless Chromium, and a small server that the page talks to."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from coldframe.runtime.gateway.page import read_page
from tests.support import unavailable

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1000,1100",
)


@contextmanager
def chromium(profile: Path) -> Iterator[WebDriver]:
    """A browser of its own. Where there is none, tests are skipped; in CI they fail."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        unavailable("there is no Chromium with its driver here: make system")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the driver's path given, Selenium looks for none, and asks nobody.
    made = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield made
    finally:
        made.quit()


def until(done: Callable[[], Any], seconds: float = 20) -> Any:
    """What becomes of something, once it is true; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


class Backstage:
    """A server with the page, whose replica is played by the test.

    Attributes:
        document: What /startup says.
        named: What it says of each model that is asked for by name; there are no others.
        key: Who wants anything else needs it, where there is one.
        seen: Method, path and headers of each request.
        asked: The bodies of completions.
        left: How many of them the client has left.
        refuse: What completions are answered with, in place of tokens.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.named: dict[str, dict[str, Any]] = {}
        self.key = ""
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.left = 0
        self.refuse: Response | None = None
        self.url = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()

    def say(self, line: str | None) -> None:
        """Sends a line of the stream as it is; None breaks it off."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._lines.put_nowait, line)

    def token(self, text: str) -> None:
        """Sends a token as OpenAI does."""
        choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
        self.say(f"data: {json.dumps({'id': 'c', 'choices': [choice]})}\n\n")

    def end(self, tokens: int) -> None:
        """Sends how many tokens there were, and the end."""
        self.say(f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n")
        self.say("data: [DONE]\n\n")

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(seen == path for _, seen, _ in self.seen)

    # -- the server ------------------------------------------------------------------------------

    def _app(self) -> FastAPI:
        app = FastAPI()
        page = read_page()

        async def shown(request: Request) -> Response:
            self._note(request)
            return Response(page.body, headers=dict(page.headers))

        async def startup(request: Request) -> Response:
            self._note(request)
            if not self._may(request):
                return _NO_KEY
            name = request.query_params.get("model")
            if name is None:
                return JSONResponse(self.document)
            return JSONResponse(self.named[name]) if name in self.named else _NO_MODEL

        async def completions(request: Request) -> Response:
            self._note(request)
            if not self._may(request):
                return _NO_KEY
            self.asked.append(await request.json())
            if self.refuse is not None:
                return self.refuse
            return StreamingResponse(self._stream(request), media_type="text/event-stream")

        app.add_api_route("/", shown, response_model=None)
        app.add_api_route("/startup", startup, response_model=None)
        app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
        return app

    def _note(self, request: Request) -> None:
        self.seen.append((request.method, request.url.path, dict(request.headers)))

    def _may(self, request: Request) -> bool:
        return not self.key or request.headers.get("authorization") == f"Bearer {self.key}"

    async def _stream(self, request: Request) -> AsyncIterator[str]:
        ended = False
        try:
            while not ended:
                line = await self._lines.get()
                if line is None:
                    return
                ended = "[DONE]" in line
                yield line
            ended = True
        finally:
            self.left += not ended

    @contextmanager
    def running(self) -> Iterator[Backstage]:
        config = uvicorn.Config(
            self._app(), host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none"
        )
        server = uvicorn.Server(config)

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await server.serve()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


_NO_MODEL = JSONResponse({"error": {"message": "The model does not exist."}}, 404)
_NO_KEY = JSONResponse({"error": {"message": "Incorrect API key provided."}}, 401)
