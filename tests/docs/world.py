"""What stands for the places, models and secrets that the pages' commands name.

A bucket is moto's, a web server nginx, the hub and a warm peer are on loopback, too; a model is the
demo's. A command is run as it stands, but for the names in `World.told`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.session
import httpx
import psutil
import pytest

from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model
from tests.docs.commands import ROOT, Block, Line, calls
from tests.loader.web.hub_server import FakeHub, Repo
from tests.loader.web.moto_server import KEY, SECRET, isolate, moto, upload
from tests.loader.web.servers import nginx
from tests.support import without_settings

__all__ = ["World"]

_COMMANDS = Path(sys.executable).parent
_REPOSITORIES = ("org/name", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B")
_TOKEN = "correct-horse-battery"
_END_S = 60.0
_LIMIT_S = 300.0
_BATCH = (
    '{"custom_id": "r1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}}\n'
)
_TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.0,40,4
2023-11-16 18:17:04.5,20,6
2023-11-16 18:18:30.0,30,5
"""
_NODES = (
    '[{"name": "a", "memory_free": "64GiB", "rate": "2GB/s", "weights": "disk", "state": "zero"}]'
)


class World:
    """Servers on loopback, and a folder to run commands in. A context manager.

    Args:
        scratch: For models and what commands write.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._stack = ExitStack()
        # A socket's path is short, and pytest's own folders are not.
        self._runs = Path(tempfile.mkdtemp(prefix="cf-"))
        self._models = scratch / "models"
        self._targets: set[str] = set()
        self._ports: dict[str, int] = {}
        self.model = self.made("model", "llama")

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        left = list(self._runs.iterdir())
        shutil.rmtree(self._runs)
        assert left == [], f"left behind: {left}"

    def port(self, shown: str) -> int:
        """A port that is free, the same one for each that the pages show."""
        return self._ports.setdefault(shown, _free_port())

    @property
    def shard(self) -> str:
        """The name of the model's first shard."""
        return min(path.name for path in self.model.glob("*.safetensors"))

    def made(self, name: str, family: str) -> Path:
        """A model of the demo's, made once."""
        path = self._models / name
        write_demo_model(path, DemoModel("tiny", family))
        return path

    # -- places, made when a command names them ---------------------------------------------------

    @cached_property
    def _s3(self) -> str:
        """A store with the model in the buckets that the pages name."""
        url = self._stack.enter_context(moto())
        with pytest.MonkeyPatch.context() as patch:
            isolate(patch, self.scratch, url)
            client = botocore.session.get_session().create_client("s3")
            for prefix in ("llama/", "model/", "prefix/"):
                with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                    upload(client, self.model, "bucket", prefix)
            client.close()
        return url

    @cached_property
    def _web(self) -> str:
        return self._stack.enter_context(nginx(self._models))

    @cached_property
    def _hub(self) -> str:
        hub = self._stack.enter_context(FakeHub())
        for name in _REPOSITORIES:
            hub.repos[name] = Repo()
            hub.repos[name].push({path.name: path.read_bytes() for path in self.model.iterdir()})
        return hub.url

    @cached_property
    def _peer(self) -> str:
        """A replica that serves peers, at this address; it stays."""
        at = f"127.0.0.1:{_free_port()}"
        self._stack.enter_context(self.serving(f"coldframe serve {self.model} --serve-peers {at}"))
        return at

    @cached_property
    def _server(self) -> str:
        """A server of the model; it stays."""
        return self._stack.enter_context(self.serving(f"coldframe serve {self.model}"))

    # -- what is told instead ---------------------------------------------------------------------

    def told(self, text: str) -> str:
        """A command with what stands for its placeholders."""
        for pattern, by in _BY.items():
            if re.search(pattern, text):
                text = re.sub(pattern, lambda found, by=by: by(self, found), text)
        return text

    def file(self, name: str, content: str) -> str:
        path = self.scratch / name
        path.write_text(content)
        return str(path)

    def environment(self) -> dict[str, str]:
        """What commands have of settings: none of this machine's own."""
        kept = {n: v for n, v in without_settings().items() if not n.startswith(("AWS_", "HF_"))}
        return {
            **kept,
            "PATH": f"{_COMMANDS}:{kept.get('PATH', os.defpath)}:/usr/sbin",
            "COLDFRAME_HOST": "127.0.0.1",
            "COLDFRAME_RUN_DIR": str(self._runs),
            "COLDFRAME_PEER_TOKEN": _TOKEN,
            "KEY": "none",
            "XDG_CACHE_HOME": str(self.scratch / "cache"),
            "HF_HOME": str(self.scratch / "hub"),
            "AWS_CONFIG_FILE": str(self.scratch / "aws-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.scratch / "aws-credentials"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def places(self, text: str) -> dict[str, str]:
        """Where the stores are that a command names, in the variables that say so."""
        found = {}
        if "s3://" in text:
            found = {
                "AWS_ENDPOINT_URL_S3": self._s3,
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        if any(name in text for name in _REPOSITORIES):
            found["HF_ENDPOINT"] = self._hub
        return found

    # -- running ----------------------------------------------------------------------------------

    def run(self, block: Block, lines: list[Line]) -> None:
        """Runs a block's commands, one after the other, and looks at how each ends."""
        exports: list[str] = []
        snapshots = "snapshot" in " ".join(line.text for line in lines)
        for line in lines:
            text = self.told(line.text)
            if line.program == "export":
                exports.append(text)
                continue
            settings = {**self.environment(), **self.places(line.text)}
            if not snapshots:
                settings["COLDFRAME_SNAPSHOT"] = "off"
            if line.program == "make":
                if text in self._targets:  # several pages begin with it
                    continue
                self._targets.add(text)
            where = f"{block.where}: {line.text}"
            if _is_server(text):
                with self.serving(text, exports, settings, where):
                    pass
            else:
                self._once(line, text, exports, settings, where)

    def _once(
        self, line: Line, text: str, exports: list[str], settings: dict[str, str], where: str
    ) -> None:
        # An answer that is a refusal is none that the page means.
        text = re.sub(r"^curl ", "curl -sS --fail-with-body ", text)
        process = subprocess.Popen(
            ["bash", "-euc", "\n".join([*exports, text])],
            cwd=ROOT if line.program == "make" else self.scratch,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            printed, _ = process.communicate(timeout=_LIMIT_S)
        finally:
            _kill(process)
        # A doctor that finds something wrong with this machine has done what it is to do.
        good = (0, 1) if text.startswith("coldframe doctor") else (0,)
        if not line.output:
            assert process.returncode in good, f"{where}: {printed}"
        assert "Traceback" not in printed, f"{where}: {printed}"
        if line.output:
            assert re.fullmatch(_like(line.output), printed.rstrip(), re.DOTALL), (
                f"{where} printed:\n{printed}"
            )

    @contextmanager
    def serving(
        self,
        text: str,
        exports: list[str] | None = None,
        settings: dict[str, str] | None = None,
        where: str = "",
    ) -> Iterator[str]:
        """A server that answers, while the context lasts; it ends well on SIGTERM.

        Yields:
            Its URL.
        """
        port = _free_port()
        settings = {**(settings or self.environment()), "COLDFRAME_PORT": str(port)}
        settings.setdefault("COLDFRAME_SNAPSHOT", "off")
        found = calls(text)[0]
        said = text = re.sub(r"--port \d+", f"--port {port}", text)
        # The command itself is to be the process that gets the signal.
        for assignment in found.environment:
            name = assignment.partition("=")[0]
            said = re.sub(rf"^{name}=(\"[^\"]*\"|\$\([^)]*\)|\S*)\s+", "", said)
        given = text[: len(text) - len(said)].strip()
        script = [*(exports or []), f"export {given}" if given else ":", f"exec {said}"]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                ["bash", "-euc", "\n".join(script)],
                cwd=self.scratch,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            url = f"http://127.0.0.1:{port}"
            try:
                _wait_for(url, process)
                body = {"prompt": "Once", "max_tokens": 4}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=_END_S)
                # Whose key was drawn has told it nobody.
                assert answer.status_code == (401 if "API_KEYS" in text else 200), answer.text
                yield url
                process.terminate()
                assert process.wait(_END_S) == 0
            except BaseException:
                log.seek(0)
                print(where, text, log.read(), sep="\n", file=sys.stderr)
                raise
            finally:
                _kill(process)


def _is_server(text: str) -> bool:
    return any(c.program == "coldframe" and c.arguments[:1] == ("serve",) for c in calls(text))


def _like(output: tuple[str, ...]) -> str:
    """What a page shows, where `...` is anything."""
    return ".*".join(map(re.escape, "\n".join(output).rstrip().split("...")))


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"it ended with status {process.returncode}"
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("it does not listen")


def _kill(process: subprocess.Popen[Any]) -> None:
    """Ends a command that still runs, with all that it has started."""
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(_END_S)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


_BY = {
    # Models and files.
    r"\[MODEL\]": lambda world, _: str(world.model),
    r"(?<=seal )MODEL\b": lambda world, _: str(world.made("sealed", "llama")),
    r"(?<=serve )A B\b": lambda world, _: f"{world.model} {world.made('other', 'qwen3')}",
    r"\b(?:MODEL|SRC)\b(?!=)": lambda world, _: str(world.model),
    # That of a larger one has its decode step compiled first, which takes minutes.
    r"(?<=snapshot create )build/demo-model\b": lambda world, _: str(world.model),
    r"\bDST\b": lambda world, _: str(world.scratch / "packed"),
    r"(?<=demo-model )DIR\b": lambda world, _: str(world.scratch / "demo"),
    r"\bIN\.jsonl\b": lambda world, _: world.file("in.jsonl", _BATCH),
    r"\bOUT\.jsonl\b": lambda world, _: str(world.scratch / "out.jsonl"),
    r"(?<=--trace )(?:FILE|[a-z_]+\.csv)": lambda world, _: world.file("trace.csv", _TRACE),
    r"(?<=--nodes )FILE\b": lambda world, _: world.file("nodes.json", _NODES),
    r"(?<=--cache )DIR\b": lambda world, _: str(world.scratch / "kept"),
    r"/var/cache/\w+": lambda world, _: str(world.scratch / "kept"),
    # Places.
    r"BUCKET/PREFIX": lambda world, _: "bucket/prefix",
    r"https://models\.example\.com/[\w.-]+": lambda world, _: f"{world._web}/model",
    r"https?://(?:minio\.example:9000|storage\.googleapis\.com|ACCOUNT-ID\.[\w.]*com)": (
        lambda world, _: world._s3
    ),
    r"(?<=peer://)(?:that-host|10\.0\.0\.7):9400": lambda world, _: world._peer,
    r"(?<=http://)that-host:9400": lambda world, _: world._peer,
    r"(?<=shards/)model\.safetensors": lambda world, _: world.shard,
    r"\b(?:0\.0\.0\.0|127\.0\.0\.1|10\.0\.0\.\d+):(94\d\d)\b": (
        lambda world, found: f"127.0.0.1:{world.port(found[1])}"
    ),
    r"(?<=dns://)[\w-]+:(94\d\d)": lambda world, found: f"localhost:{world.port(found[1])}",
    r"http://127\.0\.0\.1:8000": lambda world, _: world._server,
    # Secrets.
    r"COLDFRAME_PEER_TOKEN=\.\.\.": lambda world, _: f"COLDFRAME_PEER_TOKEN={_TOKEN}",
    r"AWS_ACCESS_KEY_ID=\S+": lambda world, _: f"AWS_ACCESS_KEY_ID={KEY}",
    r"AWS_SECRET_ACCESS_KEY=\.\.\.": lambda world, _: f"AWS_SECRET_ACCESS_KEY={SECRET}",
    r"AWS_REGION=auto": lambda world, _: "AWS_REGION=us-east-1",
}
"""What stands for what; each is made when a command names it."""
