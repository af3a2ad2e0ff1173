"""Several models behind one gateway, each with its own state, card and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError
from prometheus_client.parser import text_string_to_metric_families

from coldframe.loader.errors import CheckpointError, ReplicaError
from tests.runtime.gateway.collector import Collector, running, values
from tests.runtime.gateway.front import Front, fronted
from tests.runtime.serving import together
from tests.runtime.snapshots import eventually


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Two models, both ready and left so, under KServe's contract, which has the most routes."""
    with fronted(tmp_path_factory.mktemp("warm"), "a", "b", platform="kserve") as front:
        front.ready()
        eventually(lambda: front.get("/readyz").status_code == 200)
        yield front


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    """Two models that have not been heard of yet."""
    with fronted(tmp_path, "a", "b", max_running=2, max_waiting=3) as made:
        yield made


def phases(front: Front) -> dict[str, str]:
    """Each model's state, as a probe sees it."""
    told = front.get("/readyz").json()["models"]
    return {name: model["state"] for name, model in told.items()}


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


# -- which one is meant ---------------------------------------------------------------------------


def test_openai_python_asks_two_models_in_turn(warm: Front) -> None:
    with warm.openai() as client:
        for number in range(4):
            for name in ("a", "b"):
                told = client.completions.create(model=name, prompt=f"{number}")
                assert (told.model, told.choices[0].text) == (name, f"{name}: {number}")
                messages: Any = [{"role": "user", "content": f"{number}"}]
                with client.chat.completions.create(
                    model=name, messages=messages, stream=True
                ) as chunks:
                    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
                # Each by the template of its own model.
                assert "".join(parts) == f"{name}: [{name}]{number}"
        listed = list(client.models.list())
        assert [model.id for model in listed] == ["a", "b"]
        assert client.models.retrieve("b") == listed[1]
        with pytest.raises(NotFoundError, match="This server has 'a' and 'b'") as caught:
            client.completions.create(model="c", prompt="x")
        assert caught.value.code == "model_not_found"


def test_who_names_none_gets_the_first(warm: Front) -> None:
    assert text(warm.complete()) == "a: hi"
    assert warm.post("/invoke", {"prompt": "x"}).json()["output"] == "a: x"
    assert warm.post("/invoke", {"prompt": "x", "model": "b"}).json()["output"] == "b: x"
    assert warm.post("/invoke", {"prompt": "x", "model": "c"}).status_code == 404


def test_a_tensor_goes_to_the_model_in_its_path(warm: Front) -> None:
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    for name in ("a", "b"):
        answer = warm.post(f"/v2/models/{name}/infer", {"inputs": [tensor]}).json()
        assert answer["model_name"] == name
        assert answer["outputs"][0]["data"] == [f"{name}: x"]
        assert warm.get(f"/v2/models/{name}").json()["name"] == name
        assert warm.get(f"/v2/models/{name}/versions/1/ready").json() == {
            "name": name,
            "ready": True,
        }
    assert warm.get("/v2/models/c").status_code == 404
    assert warm.post("/v2/models/c/infer", {"inputs": [tensor]}).status_code == 404


PROMPT = {"prompt": "x"}
PLATFORMS: list[tuple[str, str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    # Where a model stands in a body, and the text in its answer.
    (
        "sagemaker",
        "/invocations",
        lambda more: {"inputs": "x", **more},
        lambda told: told[0]["generated_text"],
    ),
    (
        "huggingface",
        "/",
        lambda more: {"inputs": "x", **more},
        lambda told: told[0]["generated_text"],
    ),
    (
        "vertex",
        "/predict",
        lambda more: {"instances": [{**PROMPT, **more}]},
        lambda told: told["predictions"][0],
    ),
    ("azureml", "/score", lambda more: {**PROMPT, **more}, lambda told: told["output"]),
    ("baseten", "/predict", lambda more: {**PROMPT, **more}, lambda told: told["output"]),
    (
        "cog",
        "/predictions",
        lambda more: {"input": {**PROMPT, **more}},
        lambda told: told["output"],
    ),
    ("cloud-run", "/invoke", lambda more: {**PROMPT, **more}, lambda told: told["output"]),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("platform", "route", "body", "output"), PLATFORMS)
def test_platforms_mean_the_first_unless_a_body_names_one(
    tmp_path: Path,
    platform: str,
    route: str,
    body: Callable[[Any], Any],
    output: Callable[[Any], Any],
) -> None:
    with fronted(tmp_path, "a", "b", platform=platform) as front:
        front.ready()
        assert output(front.post(route, body({})).json()) == "a: x"
        assert output(front.post(route, body({"model": "b"})).json()) == "b: x"
        assert front.post(route, body({"model": "c"})).status_code == 404


@pytest.mark.heavy
def test_many_names_are_not_all_told(tmp_path: Path) -> None:
    with fronted(tmp_path, *(f"m{number}" for number in range(20))) as front:
        told = front.complete("x").json()["error"]["message"]
        assert told.endswith("'m14', 'm15' and 4 more.")
        assert front.complete("y" * 600).status_code == 400


# -- from zero ------------------------------------------------------------------------------------


def test_a_model_that_was_never_started_is_woken_once_by_those_who_ask(front: Front) -> None:
    front.ready("a")
    front.state("b", "zero")
    eventually(lambda: phases(front) == {"a": "ready", "b": "zero"})
    # What is known of it: its name. To list it wakes nobody.
    listed = front.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["a", "b"]
    assert ("max_model_len" in listed[0], "max_model_len" in listed[1]) == (True, False)
    assert front.count("b", "wake_up") == 0
    asks: list[Callable[[], Any]] = [lambda: text(front.complete("b")) for _ in range(4)]
    asks.append(lambda: front.get("/v1/models/b").json()["id"])
    assert together(asks) == ["b: hi"] * 4 + ["b"]
    assert front.count("b", "wake_up") == 1
    assert front.count("a", "wake_up") == 0


@pytest.mark.heavy
def test_who_comes_before_it_is_known_that_it_rests_wakes_it_too(front: Front) -> None:
    def later() -> None:
        eventually(lambda: front.get("/healthz").status_code == 200)
        front.state("b", "zero")

    answer, _ = together([lambda: text(front.complete("b")), later])
    assert answer == "b: hi"
    assert front.count("b", "wake_up") == 1


@pytest.mark.heavy
def test_a_model_whose_card_is_known_is_only_given_the_request(front: Front) -> None:
    front.card("b")
    front.state("b", "zero")
    assert text(front.complete("b")) == "b: hi"
    assert front.count("b", "wake_up") == 0


@pytest.mark.heavy
def test_a_start_that_fails_may_be_tried_again(front: Front) -> None:
    front.asleep.add("b")
    front.state("b", "zero")

    def fail() -> None:
        eventually(lambda: front.count("b", "wake_up") == 1)
        front.state("b", "starting")
        front.state("b", "failed", ReplicaError("no room on the device"))

    answer, _ = together([lambda: front.complete("b"), fail])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_error")
    assert front.complete("b").json()["error"]["message"] == "no room on the device"
    front.asleep.clear()
    front.state("b", "zero")
    eventually(lambda: phases(front)["b"] == "zero")
    assert text(front.complete("b")) == "b: hi"
    assert front.count("b", "wake_up") == 2


@pytest.mark.heavy
def test_those_who_wait_for_a_card_are_bounded(front: Front) -> None:
    front.asleep.add("b")
    front.state("b", "zero")

    refusal = 'coldframe_requests_refused_total{model="b",reason="queue_full"} 1.0'

    def give_way() -> None:
        # There are six, and places for five.
        eventually(lambda: refusal in front.get("/metrics").text.splitlines())
        front.ready("b")

    *answers, _ = together([*[lambda: front.complete("b").status_code] * 6, give_way])
    assert sorted(answers) == [200] * 5 + [503]


# -- states ---------------------------------------------------------------------------------------


def test_ready_is_when_one_is_open_and_none_starts_for_the_first_time(front: Front) -> None:
    def status() -> int:
        return front.get("/readyz").status_code

    eventually(lambda: front.get("/healthz").status_code == 200)
    assert status() == 503
    front.ready("a")
    front.state("b", "starting", stage="weights", bytes_done=1, bytes_total=4)
    eventually(lambda: front.get("/startup?model=b").json()["bytes_total"] == 4)
    told = front.get("/readyz")
    assert told.status_code == 503
    assert (told.json()["model"], told.json()["bytes_total"]) == ("b", 4)
    assert {name: model["open"] for name, model in told.json()["models"].items()} == {
        "a": True,
        "b": False,
    }
    front.ready("b")
    eventually(lambda: status() == 200)
    assert front.get("/readyz").json() == {
        "status": "ready",
        "state": "ready",
        "models": {
            name: {"state": "ready", "open": True, "failures": 0, "error": None}
            for name in ("a", "b")
        },
    }
    # It starts again: that holds up nobody but those who ask for it.
    died = ReplicaError("it died", where="/a/secret/place")
    front.state("b", "starting", died, failures=3)
    eventually(lambda: phases(front)["b"] == "starting")
    answer = front.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["models"]["b"] == {
        "state": "starting",
        "open": False,
        "failures": 3,
        "error": "it died",
    }
    assert "secret" not in answer.text
    # And where neither takes requests, who asks is told of the first.
    front.state("a", "starting", failures=3)
    eventually(lambda: status() == 503)
    assert front.get("/readyz").json()["model"] == "a"


@pytest.mark.parametrize("platform", [pytest.param("runpod", marks=pytest.mark.heavy), "kserve"])
def test_a_platforms_probe_is_told_of_all(tmp_path: Path, platform: str) -> None:
    probe, loading = {"runpod": ("/ping", 204), "kserve": ("/v2/health/ready", 503)}[platform]
    keys = ("sk-0123456789abcdef",)
    with fronted(tmp_path, "a", "b", platform=platform, keys=keys) as front:

        def status(path: str = probe) -> int:
            return front.get(path).status_code

        eventually(lambda: front.get("/healthz").status_code == 200)
        front.ready("a")
        assert status() == loading
        front.state("b", "zero")
        eventually(lambda: status() == 200)
        front.state("b", "failed", ReplicaError("it died"))
        eventually(lambda: phases(front)["b"] == "failed")
        assert status() == 200
        front.state("a", "failed", ReplicaError("it died"))
        eventually(lambda: status() == 503)
        if platform == "kserve":  # without a key, each of them
            assert [status(f"/v2/models/{name}/ready") for name in "ab"] == [503, 503]
            assert status("/v2/models/c/ready") == 401


def test_one_that_has_failed_is_refused_and_the_other_served(front: Front) -> None:
    front.ready()
    front.silent.add("b")

    def fail() -> None:
        eventually(lambda: front.submitted)
        error = CheckpointError("a shard is cut", where="model.safetensors", hint="Mend it.")
        front.state("b", "failed", error)

    waited, _ = together([lambda: front.complete("b"), fail])
    for answer in (waited, front.complete("b"), front.complete("b")):
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (500, "model_error")
        assert told["message"] == "a shard is cut"
    assert text(front.complete("a")) == "a: hi"
    assert front.get("/readyz").json()["models"]["b"]["error"] == "a shard is cut"
    assert front.get("/startup?model=b").json()["error"]["where"] == "model.safetensors"
    front.silent.clear()
    front.ready("b")
    eventually(lambda: phases(front)["b"] == "ready")
    assert text(front.complete("b")) == "b: hi"


def test_the_first_that_drains_ends_the_gateway(front: Front) -> None:
    front.ready()
    front.silent.update("ab")

    def drain() -> None:
        eventually(lambda: len(front.submitted) == 2)
        front.state("a", "draining")
        front.state("b", "draining")
        eventually(lambda: not listens(front))
        for submitted in front.submitted:
            front.answer(submitted)

    *answers, _ = together(
        [lambda: text(front.complete("a")), lambda: text(front.complete("b")), drain]
    )
    assert answers == ["a: hi", "b: hi"]
    assert front.drained.wait(20)


def listens(front: Front) -> bool:
    try:
        front.get("/healthz")
    except httpx.HTTPError:
        return False
    return True


def test_each_is_put_to_sleep_and_woken_by_its_name(front: Front) -> None:
    front.ready()
    eventually(lambda: front.get("/readyz").status_code == 200)

    def sleeping(query: str = "") -> bool:
        return bool(front.get(f"/is_sleeping{query}").json()["is_sleeping"])

    assert front.post("/sleep?level=1&model=b").status_code == 200
    assert phases(front) == {"a": "ready", "b": "parked"}
    assert [sleeping(), sleeping("?model=a"), sleeping("?model=b")] == [False, False, True]
    assert front.post("/sleep?level=2").status_code == 200
    assert phases(front) == {"a": "zero", "b": "zero"}
    assert sleeping()
    assert front.post("/wake_up?model=a").status_code == 200
    assert phases(front) == {"a": "ready", "b": "zero"}
    assert front.post("/wake_up").status_code == 200
    assert phases(front) == {"a": "ready", "b": "ready"}
    for path in ("/sleep?model=c", "/wake_up?model=c"):
        assert front.post(path).json()["error"]["code"] == "model_not_found"
    assert front.get("/is_sleeping?model=c").status_code == 404
    # One that has failed is not waited for, unless it is named.
    front.state("b", "failed", ReplicaError("it died"))
    eventually(lambda: phases(front)["b"] == "failed")
    assert front.post("/sleep").status_code == 200
    assert phases(front) == {"a": "parked", "b": "failed"}
    assert sleeping()
    assert front.post("/wake_up?model=b").status_code == 200
    assert phases(front)["b"] == "ready"


@pytest.mark.heavy
def test_one_is_woken_after_the_other(front: Front) -> None:
    for name in ("a", "b"):
        front.card(name)
        front.state(name, "zero")
    front.asleep.update("ab")

    def take_turns() -> None:
        # The device holds one of them: where the second is awake, the first has gone again.
        eventually(lambda: front.count("a", "wake_up") == 1)
        assert front.count("b", "wake_up") == 0
        front.state("a", "ready")
        eventually(lambda: front.count("b", "wake_up") == 1)
        front.state("a", "zero")
        front.state("b", "ready")

    eventually(lambda: front.get("/readyz").status_code == 200)
    answer, _ = together([lambda: front.post("/wake_up"), take_turns])
    assert answer.status_code == 200
    assert phases(front) == {"a": "zero", "b": "ready"}


def test_startup_is_told_of_the_one_that_is_named(warm: Front) -> None:
    for query, name in (("", "a"), ("?model=a", "a"), ("?model=b", "b")):
        told = warm.get(f"/startup{query}").json()
        assert told["model"] == name
        assert told["timeline"]["stages"][0]["note"] == name
        assert list(told["models"]) == ["a", "b"]
    assert warm.get("/startup?model=c").status_code == 404


def test_where_there_is_one_model_nothing_is_said_of_others(tmp_path: Path) -> None:
    with fronted(tmp_path, "only") as front:
        listing, _ = together([lambda: front.get("/v1/models"), lambda: front.ready("only")])
        # Its card is waited for.
        assert listing.json()["data"][0]["max_model_len"] == 4096
        eventually(lambda: front.get("/readyz").status_code == 200)
        assert front.get("/readyz").json() == {"status": "ready", "state": "ready"}
        assert "models" not in front.get("/startup").json()
        told = front.complete("other").json()["error"]["message"]
        assert told == "The model 'other' does not exist. This server has 'only'."


# -- lines ----------------------------------------------------------------------------------------


def test_a_full_line_is_full_for_its_own_model_only(front: Front) -> None:
    front.ready("a")
    front.card("b")
    front.silent.add("b")
    front.state("b", "starting", open=True, bytes_done=100, bytes_total=700, elapsed_s=2.0)
    eventually(lambda: front.get("/startup?model=b").json()["rate"] == 50)

    def flood() -> None:
        eventually(lambda: queue(front, "b") == {"running": 2, "waiting": 3})
        answer = front.complete("b")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
        # When to come again follows from the rate at which that model loads.
        assert answer.headers["retry-after"] == "12"
        assert text(front.complete("a")) == "a: hi"
        assert queue(front, "a") == {"running": 0, "waiting": 0}
        front.silent.clear()
        for submitted in [one for one in front.submitted if one["model"] == "b"]:
            front.answer(submitted)

    *answers, _ = together([*[lambda: text(front.complete("b"))] * 5, flood])
    assert answers == ["b: hi"] * 5
    numbers = [submitted["id"] for submitted in front.submitted]
    assert len(set(numbers)) == len(numbers)


def queue(front: Front, model: str) -> dict[str, int]:
    found = front.get(f"/startup?model={model}").json()["queue"]
    assert isinstance(found, dict)
    return found


# -- what is seen of it ---------------------------------------------------------------------------


def test_series_have_a_model_and_shared_processes_have_none(warm: Front) -> None:
    for name in ("a", "b", "b"):
        text(warm.complete(name))
    assert warm.post("/v1/completions", {"prompt": 7, "model": "b"}).status_code == 400
    families = list(text_string_to_metric_families(warm.get("/metrics").text))

    def series(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        samples = [s for f in families for s in f.samples if s.name == f"coldframe_{name}"]
        found = {tuple(s.labels[label] for label in labels): s.value for s in samples}
        assert len(found) == len(samples) > 0
        return found

    assert series("weights_bytes", "model") == {("a",): 1, ("b",): 2}
    assert series("kv_blocks", "model", "state")["b", "free"] == 2
    assert series("request_success_total", "model", "finished_reason")["b", "stop"] >= 2
    assert series("requests_refused_total", "model", "reason")["b", "bad_request"] == 1
    assert series("process_memory_bytes", "model", "process", "kind") == {
        ("", "front", "anon"): 1,
        ("", "gateway", "anon"): 2,
        ("a", "memory", "anon"): 100,
        ("b", "memory", "anon"): 200,
    }


@pytest.mark.heavy
def test_lines_of_the_log_say_which_model(front: Front) -> None:
    front.ready("a")
    front.state("b", "failed", ReplicaError("it died"))
    text(front.complete("a"))
    assert front.complete("b").status_code == 503
    assert front.complete("c").status_code == 404

    def told() -> list[tuple[int, str | None]]:
        lines = [line for line in front.log if line.get("path") == "/v1/completions"]
        return [(line["status"], line.get("model")) for line in lines]

    eventually(lambda: len(told()) == 3)
    assert told() == [(200, "a"), (503, "b"), (404, None)]


@pytest.mark.heavy
def test_requests_are_traced_with_the_start_of_their_own_model(tmp_path: Path) -> None:
    with running(Collector()) as collector:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        with fronted(tmp_path, "a", "b", environ=environ) as front:
            for name in ("a", "b"):
                front.card(name)
                front.state(name, "starting", open=True)

            def start() -> None:
                eventually(lambda: len(front.submitted) == 2)
                # The last one's comes first; nobody takes it for theirs.
                front.state("b", "ready")
                eventually(lambda: front.count("b", "startup") == 1)
                front.state("a", "ready")

            together([lambda: front.complete("a"), lambda: front.complete("b"), start])
            eventually(lambda: len([s for s in collector.spans if s.name == "cold_start"]) == 2)
    servers = {s.span_id: s for s in collector.spans if s.name == "POST /v1/completions"}
    for span in [s for s in collector.spans if s.name == "cold_start"]:
        asked = values(servers[span.parent_span_id])["gen_ai.request.model"]
        assert values(span)["coldframe.model"] == asked
        assert values(collector.children(span)["prefill[head]"])["coldframe.note"] == asked
