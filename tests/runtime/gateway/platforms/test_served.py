"""`coldframe serve` as each platform starts it: its environment, its probes, its bodies, its end.

The weights come slowly, so that the first probe is answered while they do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.heavy

MAIN = "import sys; from coldframe.runtime.cli import main; sys.exit(main())"
SERVE = [sys.executable, "-c", MAIN, "serve"]

PROMPT = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
TENSOR = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hello"]}

PLATFORM_SIGNS = ("K_", "AIP_", "RUNPOD_", "SAGEMAKER_", "AZUREML_", "KUBERNETES_", "COLDFRAME_")


@contextmanager
def started(
    model: Path, environ: dict[str, str], arguments: tuple[str, ...]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A container's main process, and the address that it listens on."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(PLATFORM_SIGNS) and name != "PORT"
    }
    arguments = tuple(argument.replace("MODEL", str(model)) for argument in arguments)
    process = subprocess.Popen(
        [*SERVE, *arguments],
        env={**clean, **environ, "COLDFRAME_SNAPSHOT": "off", "COLDFRAME_THROTTLE": "2MB/s"},
    )
    try:
        yield process, f"http://127.0.0.1:{_port(process)}"
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        for connection in psutil.Process(process.pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                return int(connection.laddr.port)
        time.sleep(0.01)
    raise AssertionError("it does not listen")


# What the platform sets and says, its probe with the status while loading and when ready, and a
# request with the place of the text in its answer.
CASES: dict[str, tuple[dict[str, str], tuple[str, ...], tuple[str, int], tuple[str, Any, Any]]] = {
    "generic": (
        {"PORT": "0"},
        ("MODEL",),
        ("/readyz", 503),
        ("/invoke", PROMPT, lambda said: said["output"]),
    ),
    "cloud-run": (
        {"PORT": "0", "K_SERVICE": "s"},
        ("MODEL",),
        ("/readyz", 503),
        ("/v1/completions", PROMPT, lambda said: said["choices"][0]["text"]),
    ),
    "sagemaker": (
        {"SAGEMAKER_BIND_TO_PORT": "0"},
        ("MODEL",),
        ("/ping", 503),
        (
            "/invocations",
            {"inputs": "hello", "parameters": {"max_new_tokens": 3}},
            lambda said: said[0]["generated_text"],
        ),
    ),
    "vertex": (
        {
            "AIP_HTTP_PORT": "0",
            "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
            "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
        },
        ("MODEL",),
        ("/v1/endpoints/1/deployedModels/2", 503),
        (
            "/v1/endpoints/1/deployedModels/2:predict",
            {"instances": ["hello"], "parameters": {"max_tokens": 3, "temperature": 0}},
            lambda said: said["predictions"][0],
        ),
    ),
    "runpod": (
        {"RUNPOD_POD_ID": "p", "PORT": "0", "PORT_HEALTH": "0"},
        ("MODEL",),
        ("/ping", 204),
        ("/v1/completions", PROMPT, lambda said: said["choices"][0]["text"]),
    ),
    "kserve": (
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        ("--model_dir=MODEL", "--model_name=m", "--http_port=0"),
        ("/v2/health/ready", 503),
        (
            "/v2/models/m/infer",
            {"inputs": [TENSOR], "parameters": {"max_tokens": 3, "temperature": 0}},
            lambda said: said["outputs"][0]["data"][0],
        ),
    ),
    "huggingface": (
        {"COLDFRAME_PLATFORM": "huggingface", "PORT": "0"},
        ("MODEL",),
        ("/health", 503),
        (
            "/",
            {"inputs": "hello", "parameters": {"max_new_tokens": 3}},
            lambda said: said[0]["generated_text"],
        ),
    ),
    "azureml": (
        {"AZUREML_MODEL_DIR": "MODEL"},
        ("--port", "0"),
        ("/readyz", 503),
        ("/score", PROMPT, lambda said: said["output"]),
    ),
    "cog": (
        {},
        ("MODEL", "--platform", "cog", "--port=0"),
        ("/health-check", 200),
        (
            "/predictions",
            {"input": PROMPT},
            lambda said: said["output"],
        ),
    ),
    "baseten": (
        {},
        ("MODEL", "--platform=baseten", "--port=0"),
        ("/health", 503),
        ("/predict", PROMPT, lambda said: said["output"]),
    ),
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("name", CASES)
def test_a_container_of_the_platform(
    name: str, demo_model: Callable[..., Path], texts: dict[str, str]
) -> None:
    environ, arguments, (probe, loading), (route, body, text_of) = CASES[name]
    model = demo_model()
    environ = {key: value.replace("MODEL", str(model)) for key, value in environ.items()}
    with (
        started(model, environ, arguments) as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        first = client.get(probe)
        assert first.status_code == loading
        if name == "cog":
            assert first.json()["status"] == "STARTING"

        answer = client.post(route, json=body)  # held while it is cold
        assert answer.status_code == 200, answer.text
        texts[name] = text_of(answer.json())
        assert set(texts.values()) == {texts[name]}, "every platform gets the same greedy text"

        assert client.get(probe).status_code == 200
        wrong = client.post(route, json=[])
        assert 400 <= wrong.status_code < 500
        json.loads(wrong.content)

        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_model_that_nothing_can_read_is_said_so(tmp_path: Path) -> None:
    environ = {**os.environ, "AIP_HTTP_PORT": "0", "AIP_STORAGE_URI": "gs://bucket/model"}
    done = subprocess.run(SERVE, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "AIP_STORAGE_URI" in done.stderr
    assert "image" in done.stderr
    assert "Traceback" not in done.stderr
