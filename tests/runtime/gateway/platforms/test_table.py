"""The platforms' contracts: each row is known by its own environment, and complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.runtime.gateway.platforms.adapters import ADAPTERS, adapter
from coldframe.runtime.gateway.platforms.documents import KINDS, document
from coldframe.runtime.gateway.platforms.profile import Profile, Route
from coldframe.runtime.gateway.platforms.table import COMMON, PROFILES, SIGNS, by_name, detect

ROOT = Path(__file__).resolve().parents[4]

CLUSTER = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
KNATIVE = {"K_SERVICE": "s", "K_REVISION": "s-1", "K_CONFIGURATION": "s", "PORT": "8012"}
POD = {"RUNPOD_POD_ID": "p", "RUNPOD_ENDPOINT_ID": "e", "RUNPOD_API_KEY": "k"}

# What a platform sets, the folders it mounts, the profile, and the port that follows.
SURROUNDINGS: list[tuple[dict[str, str], tuple[str, ...], str, int]] = [
    ({}, (), "generic", 8000),
    ({"PORT": "9000"}, (), "generic", 9000),
    (CLUSTER, (), "kubernetes", 8000),
    ({**CLUSTER, **KNATIVE}, (), "knative", 8012),
    (KNATIVE, (), "cloud-run", 8012),
    ({"K_SERVICE": "s"}, (), "cloud-run", 8080),
    ({"SAGEMAKER_BIND_TO_PORT": "8081"}, ("/opt/ml/model",), "sagemaker", 8081),
    ({}, ("/opt/ml/model",), "sagemaker", 8080),
    ({"AIP_HTTP_PORT": "8085", "AIP_STORAGE_URI": ""}, (), "vertex", 8085),
    ({"AIP_HTTP_PORT": "8080", **CLUSTER}, (), "vertex", 8080),
    ({**POD, "PORT": "80", "PORT_HEALTH": "80"}, (), "runpod", 80),
    ({**POD, "PORT": "5000"}, (), "runpod", 5000),
    ({**POD, "RUNPOD_WEBHOOK_GET_JOB": "http://x/job-take/e/$ID"}, (), "runpod-queue", 0),
    ({**POD, "RUNPOD_WEBHOOK_GET_JOB": "http://x", "PORT": "80"}, (), "runpod-queue", 0),
    (POD, (), "generic", 8000),
    ({**CLUSTER, "STORAGE_URI": "/mnt/models"}, ("/mnt/models",), "kserve", 8080),
    ({**CLUSTER, **KNATIVE, "STORAGE_URI": "/mnt/models"}, (), "kserve", 8012),
    ({**CLUSTER}, ("/mnt/models",), "kserve", 8080),
    ({}, ("/mnt/models",), "generic", 8000),
    ({**CLUSTER}, ("/repository",), "huggingface", 80),
    ({"AZUREML_MODEL_DIR": "/var/azureml-app/azureml-models/m/1"}, (), "azureml", 5001),
]


@pytest.mark.parametrize(("environ", "folders", "name", "port"), SURROUNDINGS)
def test_a_platform_is_known_by_what_it_leaves(
    environ: dict[str, str], folders: tuple[str, ...], name: str, port: int
) -> None:
    profile = detect(environ, is_folder=folders.__contains__)
    assert profile.name == name
    assert profile.port(environ) == port


def test_every_sign_and_every_profile_is_exercised_here() -> None:
    shown = {name for _, _, name, _ in SURROUNDINGS}
    unmarked = {"cog", "baseten"}
    assert shown | unmarked == {profile.name for profile in PROFILES}
    assert {name for name, _ in SIGNS} <= shown
    for name, signs in SIGNS:
        found = detect(dict.fromkeys(signs, "80"), is_folder=set(signs).__contains__)
        assert found.name == name, signs


def test_empty_variables_are_as_good_as_none() -> None:
    environ = {"AIP_HTTP_PORT": "", "K_SERVICE": "", "PORT": ""}
    profile = detect(environ, is_folder=lambda path: False)
    assert (profile.name, profile.port(environ)) == ("generic", 8000)


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--model_name=m"], ["serve", "--http_port", "8080"], ["--model_dir=/mnt/models"]],
)
def test_a_platforms_own_flags_give_it_away(arguments: list[str]) -> None:
    assert detect({}, arguments, lambda path: False).name == "kserve"
    assert detect({}, ["serve", "--port", "1"], lambda path: False).name == "generic"


# name, default port, drain, loading status of its health route, the model's place
CONTRACTS = [
    ("generic", 8000, 10, None, None),
    ("kubernetes", 8000, 30, None, None),
    ("knative", 8080, 30, None, None),
    ("cloud-run", 8080, 10, None, None),
    ("sagemaker", 8080, 30, 503, "/opt/ml/model"),
    ("vertex", 8080, 30, 503, None),
    ("runpod", 80, 30, 204, None),
    ("runpod-queue", 0, 30, None, None),
    ("kserve", 8080, 30, 503, "/mnt/models"),
    ("huggingface", 80, 30, 503, "/repository"),
    ("azureml", 5001, 30, None, None),
    ("cog", 5000, 10, 200, None),
    ("baseten", 8000, 30, 503, None),
]


@pytest.mark.parametrize(("name", "port", "killed_after", "loading", "model"), CONTRACTS)
def test_contracts(
    name: str, port: int, killed_after: float, loading: int | None, model: str | None
) -> None:
    profile = by_name(name)
    assert profile.port({}) == port
    assert profile.bind == "early"
    assert 0 < killed_after - profile.drain_s <= 2, "drained before it is killed, and not long"
    assert profile.model({}) == model
    health = [route for route in profile.routes if route.kind in HEALTH]
    assert ({told(route, "starting")[0] for route in health} or {None}) == {loading}


HEALTH = ("health", "v2-ready", "cog-health")


def told(route: Route, phase: str, path: dict[str, str] | None = None) -> tuple[int, Any]:
    """What a route says where there is one model."""
    return document(route, phase, {"m": phase}, path)


def test_every_contract_is_a_row_and_every_row_is_complete() -> None:
    assert [profile.name for profile in PROFILES] == [name for name, *_ in CONTRACTS]
    for profile in PROFILES:
        assert profile.why.endswith(".")
        assert profile.host in ("0.0.0.0", "127.0.0.1")
        assert profile.errors in ADAPTERS
        assert {meaning for _, meaning in profile.aliases} <= {"port", "model", "name"}
        for route in (*profile.routes, *COMMON):
            assert route.path.startswith("/")
            if route.kind == "predict":
                assert route.method in ("POST", "PUT")
                assert callable(adapter(route.adapter or "").read)
            else:
                assert (route.method, route.adapter) == ("GET", None)
                assert route.kind in KINDS


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(PlatformError) as caught:
        by_name("lambda")
    assert all(profile.name in str(caught.value) for profile in PROFILES)


@pytest.mark.parametrize("text", ["http", "65536", "-1", "80.0", "8 0", "٣", "99999999999", "0x50"])
def test_a_port_that_is_none(text: str) -> None:
    with pytest.raises(PlatformError, match="no port") as caught:
        by_name("cloud-run").port({"PORT": text})
    assert caught.value.where == "PORT"


def test_a_health_port_of_its_own() -> None:
    runpod = by_name("runpod")
    assert runpod.health_port({}) is None
    assert runpod.health_port({"PORT": "8000", "PORT_HEALTH": "8000"}) is None
    assert runpod.health_port({"PORT_HEALTH": "80"}) is None
    assert runpod.health_port({"PORT": "8000", "PORT_HEALTH": "8001"}) == 8001
    with pytest.raises(PlatformError, match="PORT_HEALTH"):
        runpod.health_port({"PORT_HEALTH": "no"})


def test_vertex_says_its_routes() -> None:
    vertex = by_name("vertex")
    prediction = "/v1/endpoints/123/deployedModels/456:predict"
    environ = {"AIP_HEALTH_ROUTE": "/v1/health", "AIP_PREDICT_ROUTE": prediction}
    routes = {route.kind: route.path for route in vertex.routes_for(environ)}
    assert routes == {"health": "/v1/health", "predict": prediction}
    assert {route.path for route in vertex.routes_for({})} == {"/health", "/predict"}


def test_runpods_health_route_keeps_its_status_wherever_it_is() -> None:
    (route,) = by_name("runpod").routes_for({"HEALTH_CHECK_PATH": "/up"})
    assert (route.path, route.loading) == ("/up", 204)


@pytest.mark.parametrize(
    "path", ["predict", "http://x/y", "/a b", "/a{b}", "/a?b", "/a#b", "/ä", "/a\n", "{x}"]
)
def test_a_route_that_is_none(path: str) -> None:
    with pytest.raises(PlatformError, match="no path") as caught:
        by_name("vertex").routes_for({"AIP_PREDICT_ROUTE": path})
    assert caught.value.where == "AIP_PREDICT_ROUTE"


def test_two_routes_at_one_path() -> None:
    routes = (Route("GET", "/a", "health"), Route("GET", "/b", "live", variable="B"))
    profile = Profile("p", why="", routes=routes)
    assert len(profile.routes_for({})) == 2
    with pytest.raises(PlatformError, match="same path"):
        profile.routes_for({"B": "/a"})


def test_where_the_model_is() -> None:
    assert by_name("azureml").model({"AZUREML_MODEL_DIR": "/models/1"}) == "/models/1"
    assert by_name("kserve").model({"STORAGE_URI": "/mnt/models/x"}) == "/mnt/models/x"
    assert by_name("sagemaker").model({"HF_MODEL_ID": "org/model"}) == "org/model"
    runpod = by_name("runpod")
    assert runpod.model({"MODEL_NAME": "org/model"}) == "org/model"
    assert runpod.model_name({}) is None
    assert runpod.model_name({"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "m"}) == "m"
    vertex = by_name("vertex")
    assert vertex.model({"AIP_STORAGE_URI": ""}) is None
    assert vertex.model({"AIP_STORAGE_URI": "s3://bucket/model"}) == "s3://bucket/model"


@pytest.mark.parametrize(
    ("name", "variable", "place"),
    [("vertex", "AIP_STORAGE_URI", "gs://b/model"), ("kserve", "STORAGE_URI", "pvc://claim/m")],
)
def test_a_model_that_nothing_here_can_read(name: str, variable: str, place: str) -> None:
    with pytest.raises(PlatformError, match="image") as caught:
        by_name(name).model({variable: place})
    assert caught.value.where == variable


@pytest.mark.parametrize(
    ("kind", "phase", "status"),
    [
        ("health", "ready", 200),
        ("health", "draining", 503),
        ("health", "failed", 503),
        ("live", "starting", 200),
        ("live", "failed", 200),
        ("v2-live", "starting", 200),
        ("v2-ready", "starting", 503),
        ("v2-ready", "ready", 200),
        ("v2-server", "starting", 200),
        ("cog-health", "starting", 200),
    ],
)
def test_statuses_of_health(kind: str, phase: str, status: int) -> None:
    assert told(Route("GET", "/x", kind), phase)[0] == status


def test_runpod_calls_only_a_start_initialising() -> None:
    (route,) = by_name("runpod").routes
    said = {phase: told(route, phase) for phase in ("starting", "ready", "draining")}
    assert said["starting"] == (204, None)
    assert said["ready"][0] == 200
    assert said["draining"][0] == 503, "it is not coming up any more"


def test_documents_of_the_inference_protocol() -> None:
    model = Route("GET", "/v2/models/{model}", "v2-model")
    status, said = told(model, "starting", {"model": "m"})
    assert (status, said["name"], said["versions"]) == (200, "m", ["1"])
    assert {"name", "datatype", "shape"} == set(said["inputs"][0])
    assert told(model, "ready", {"model": "other"})[0] == 404
    assert told(model, "ready", {"model": "m", "version": "2"})[0] == 404
    ready = Route("GET", "/v2/models/{model}/ready", "v2-model-ready")
    assert told(ready, "starting", {"model": "m"}) == (503, {"name": "m", "ready": False})
    assert told(ready, "ready", {"model": "m", "version": "1"})[0] == 200
    status, said = told(Route("GET", "/v2", "v2-server"), "ready")
    assert (status, said["name"], said["extensions"]) == (200, "coldframe", [])
    assert said["version"]


def test_each_of_several_models_has_documents_of_its_own() -> None:
    ready = Route("GET", "/v2/models/{model}/ready", "v2-model-ready")
    phases = {"a": "ready", "b": "failed"}
    assert document(ready, "ready", phases, {"model": "a"}) == (200, {"name": "a", "ready": True})
    assert document(ready, "ready", phases, {"model": "b"}) == (503, {"name": "b", "ready": False})
    assert document(ready, "ready", phases, {"model": "c"})[0] == 404
    assert document(Route("GET", "/ping", "health"), "ready", phases)[0] == 200


def test_cog_says_how_far_it_is() -> None:
    route = Route("GET", "/health-check", "cog-health")
    said = [told(route, p)[1]["status"] for p in ("starting", "ready", "failed")]
    assert said == ["STARTING", "READY", "SETUP_FAILED"]


def test_the_table_comes_before_all_that_is_slow_to_import() -> None:
    # The port is bound right behind it, within milliseconds of the exec.
    code = (
        "import sys; root = type(sys)('coldframe'); sys.modules['coldframe'] = root; "
        f"root.__path__ = [{str(ROOT)!r}]; "
        "from coldframe.runtime.gateway.platforms.table import detect; "
        "assert 0 < detect({'PORT': '1', 'K_SERVICE': 's'}).port({'PORT': '1'}); "
        "print(' '.join(sys.modules))"
    )
    run = [sys.executable, "-S", "-E", "-P", "-c", code]
    names = set(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert "coldframe.runtime.gateway.platforms.table" in names
    assert not names & {"typing", "enum", "re", "dataclasses", "collections", "functools"}
