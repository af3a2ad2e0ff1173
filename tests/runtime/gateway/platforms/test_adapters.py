"""The platforms' bodies, as their documents and clients have them, through OpenAI's and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError
from hypothesis import given
from hypothesis import strategies as st

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.adapters import ADAPTERS, adapter
from coldframe.runtime.gateway.platforms.parameters import MAX_PROMPTS, openai_parameters

Ask = Callable[..., Any]
Refused = Callable[..., ApiError]
Stream = Callable[..., list[tuple[str, Any]]]

CHAT = [{"role": "user", "content": "good day"}]
USAGE = {
    "prompt_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens": 2,
    "total_tokens": 5,
}


def body_of(name: str, body: object, index: int = 0) -> dict[str, Any]:
    return adapter(name).read(body).items[index][1]


# Parameters


@pytest.mark.parametrize(
    ("given_", "found"),
    [
        ({"max_new_tokens": 5, "stop_sequences": ["x"]}, {"max_tokens": 5, "stop": ["x"]}),
        ({"max_new_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"num_return_sequences": 2, "seed": None}, {"n": 2}),
        ({"temperature": 0.5, "do_sample": False}, {"temperature": 0.5}),
        ({"temperature": 1.0, "do_sample": False}, {"temperature": 0}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": True}, {"temperature": 1}),
        ({"do_sample": False, "top_k": 5}, {"temperature": 1, "top_k": 5}),
        ({"watermark": False, "typical_p": 1.0, "num_beams": 1, "grammar": None}, {}),
        ({"stream": True, "prompt": "x", "model": "y"}, {}),
        ({"whatever": 1}, {"whatever": 1}),
    ],
)
def test_parameters(given_: dict[str, Any], found: dict[str, Any]) -> None:
    assert openai_parameters(given_) == found


@pytest.mark.parametrize(
    ("given_", "temperature"),
    [({}, 0), ({"top_p": 0.9}, 1), ({"temperature": 1.0}, 1.0), ({"do_sample": True}, 1)],
)
def test_text_generation_is_greedy_unless_told(given_: dict[str, Any], temperature: float) -> None:
    assert openai_parameters(given_, greedy=True)["temperature"] == temperature
    assert openai_parameters({}) == {}


@pytest.mark.parametrize(
    "given_",
    [
        {"watermark": True},
        {"typical_p": 0.9},
        {"truncate": 10},
        {"grammar": {"type": "regex", "value": "a"}},
        {"num_beams": 4},
        {"decoder_input_details": True},
        {"top_n_tokens": 3},
        {"adapter_id": "x"},
        {"max_length": 10},
        {"min_new_tokens": 2},
        {"do_sample": "yes"},
        {"max_new_tokens": 5, "max_tokens": 6},
    ],
)
def test_what_cannot_be_done_is_refused_by_name(given_: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        openai_parameters(given_)
    assert caught.value.status == 400
    assert caught.value.param in given_
    assert str(caught.value.param) in caught.value.message


# What holds for every adapter

GOOD: dict[str, Any] = {
    "cog": {"input": {"prompt": "good day"}},
    "huggingface": {"inputs": "good day"},
    "invoke": {"prompt": "good day"},
    "kserve": {
        "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["good day"]}]
    },
    "openai": {"prompt": "good day"},
    "runpod": {"prompt": "good day"},
    "sagemaker": {"inputs": "good day"},
    "vertex": {"instances": ["good day"]},
}


def test_there_is_a_body_for_every_adapter() -> None:
    assert set(GOOD) == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("body", [None, [], "text", 1, {}, {"stream": True}])
def test_no_such_body(name: str, body: object, refused: Refused) -> None:
    error = refused(name, body)
    assert error.status == 400
    assert len(error.message) > 10


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_prompt_comes_through(name: str, ask: Ask) -> None:
    assert "GOOD DAY" in json.dumps(ask(name, GOOD[name]))
    assert adapter(name).read(GOOD[name]).items[0][1].get("prompt") == "good day"


KEYS = sorted(
    {"inputs", "input", "prompt", "messages", "role", "content", "parameters", "stream", "n"}
    | {"instances", "@requestFormat", "name", "shape", "datatype", "data", "outputs", "id"}
    | {"webhook", "do_sample", "max_new_tokens", "stop", "stop_sequences", "system_prompt"}
    | {"openai_route", "openai_input", "sampling_params", "return_full_text", "details", "model"}
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.sampled_from(["", "x", "messages", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(name=st.sampled_from(sorted(ADAPTERS)), data=st.data())
def test_any_body_is_read_or_refused(name: str, data: st.DataObject) -> None:
    good = GOOD[name]
    changes = data.draw(st.dictionaries(st.sampled_from(sorted({*KEYS, *good})), VALUES))
    body = {**good, **changes}
    if isinstance(good.get("input"), dict) and data.draw(st.booleans()):
        body["input"] = {**good["input"], **changes}
    found = adapter(name)
    try:
        requests = found.read(body)
    except ApiError as error:
        status, document = found.error(error)
        json.dumps(document)
        good_answer = status in (400, 404, 422)
    else:
        kinds = {kind for kind, _ in requests.items}
        count = len(requests.items)
        good_answer = kinds <= {"chat", "completion"} and 0 < count <= MAX_PROMPTS
        good_answer = good_answer and (count == 1 or not requests.stream)
    assert good_answer


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 429, 500, 503])
def test_every_error_has_a_shape_that_says_it(name: str, status: int) -> None:
    shown, document = adapter(name).error(ApiError(status, "It went wrong.", param="a.b"))
    assert shown == status or (name, status, shown) == ("cog", 400, 422)
    assert "It went wrong." in json.dumps(document)


# /invoke


def test_invoke_says_little(ask: Ask) -> None:
    assert ask("invoke", {"prompt": "good day"}) == {
        "output": "GOOD DAY",
        "finish_reason": "stop",
        "usage": USAGE,
        "model": "demo",
    }


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ({"messages": CHAT}, "GOOD DAY"),
        ({"input": CHAT}, "GOOD DAY"),
        ({"inputs": "good day", "max_tokens": 1}, "GOOD"),
        ({"input": "good day", "parameters": {"max_new_tokens": 1}}, "GOOD"),
        ({"input": "a b", "parameters": {"max_tokens": 1}, "max_tokens": 2}, "A B"),
        ({"prompt": ["a", "b"]}, ["A", "B"]),
        ({"prompt": ["a"]}, ["A"]),
        ({"prompt": "a", "n": 2}, ["A", "A"]),
        ({"prompt": "a", "model": "demo", "unheard_of": 1}, "A"),
    ],
)
def test_invoke_takes_every_prompt(body: dict[str, Any], output: object, ask: Ask) -> None:
    assert ask("invoke", body)["output"] == output


def test_invoke_refuses(refused: Refused) -> None:
    assert "one of prompt" in refused("invoke", {"prompt": "a", "messages": CHAT}).message
    assert refused("invoke", {"prompt": "a", "model": "other"}).status == 404
    assert refused("invoke", {"prompt": "a", "stream": "yes"}).param == "stream"
    assert refused("invoke", {"prompt": ["a", "b"], "stream": True}).param == "stream"
    assert refused("invoke", {"prompt": "a", "n": 2, "stream": True}).param == "stream"
    assert refused("invoke", {"prompt": "a", "parameters": []}).param == "parameters"
    assert refused("invoke", {"prompt": "a", "return_full_text": True}).status == 400


def test_invoke_streams(stream: Stream) -> None:
    events = [data for _, data in stream("invoke", {"prompt": "good day", "stream": True})]
    assert [event["output"] for event in events[:-1]] == ["GOOD", " DAY", ""]
    assert events[-2] == {"output": "", "finish_reason": "stop", "usage": USAGE, "model": "demo"}
    assert events[-1] == "[DONE]"
    assert stream("invoke", {"messages": CHAT}, sse=True)[-2][1]["usage"] == USAGE


def test_invoke_tells_of_a_stream_that_breaks_off(stream: Stream) -> None:
    body = {"prompt": "good day", "stream": True}
    events = stream("invoke", body, ApiError(500, "gone"))
    assert events[0][1] == {"output": "GOOD"}
    assert events[-1][1]["error"]["message"] == "gone"


# Vertex AI


def test_vertex_keeps_the_order(ask: Ask) -> None:
    instances = ["a", {"prompt": "b b", "max_tokens": 1}, {"messages": CHAT}, {"inputs": "c"}]
    said = ask("vertex", {"instances": instances, "parameters": {"temperature": 0}})
    assert said == {"predictions": ["A", "B", "GOOD DAY", "C"]}


def test_vertex_instances_go_before_what_is_shared(ask: Ask) -> None:
    body = {
        "instances": ["a b c", {"inputs": "a b c", "parameters": {"max_new_tokens": 2}}],
        "parameters": {"max_tokens": 1},
    }
    with pytest.raises(ApiError, match="max_tokens"):
        ask("vertex", body)
    body["parameters"] = {"max_new_tokens": 1}
    assert ask("vertex", body) == {"predictions": ["A", "A B"]}


def test_vertex_chat_completions_are_whole_documents(ask: Ask) -> None:
    instance = {"@requestFormat": "chatCompletions", "messages": CHAT, "max_tokens": 50}
    alone = ask("vertex", {"instances": [instance]})["predictions"]
    assert alone["choices"][0]["message"]["content"] == "GOOD DAY"
    several = ask("vertex", {"instances": [instance, "a"]})["predictions"]
    assert several[0]["choices"][0]["message"]["content"] == "GOOD DAY"
    assert several[1] == "A"


def test_vertex_raw_predictions_are_openais(ask: Ask, stream: Stream) -> None:
    assert ask("vertex", {"messages": CHAT})["object"] == "chat.completion"
    assert ask("vertex", {"prompt": "a"})["object"] == "text_completion"
    assert stream("vertex", {"prompt": "a", "stream": True})[-1] == ("", "[DONE]")


def test_vertex_streams_one_instance(stream: Stream, refused: Refused) -> None:
    instance = {"@requestFormat": "chatCompletions", "messages": CHAT, "stream": True}
    events = stream("vertex", {"instances": [instance]})
    texts = [event["choices"][0]["delta"].get("content", "") for _, event in events[:-1]]
    assert "".join(texts) == "GOOD DAY"
    assert refused("vertex", {"instances": [instance, instance]}).param == "stream"


@pytest.mark.parametrize(
    "instances",
    [
        None,
        [],
        "a",
        [1],
        [["a"]],
        [{}],
        [{"prompt": ["a"]}],
        [{"prompt": "a", "messages": CHAT}],
        [{"@requestFormat": "textCompletions", "prompt": "a"}],
        [{"@requestFormat": "chatCompletions", "prompt": "a"}],
        ["a"] * (MAX_PROMPTS + 1),
    ],
)
def test_vertex_refuses(instances: object, refused: Refused) -> None:
    assert "instances" in refused("vertex", {"instances": instances}).message


def test_vertex_errors_are_googles() -> None:
    assert adapter("vertex").error(ApiError(429, "full")) == (
        429,
        {"error": {"code": 429, "message": "full", "status": "RESOURCE_EXHAUSTED"}},
    )


# SageMaker and Hugging Face


@pytest.mark.parametrize("name", ["sagemaker", "huggingface"])
def test_one_route_takes_all_schemas(name: str, ask: Ask) -> None:
    assert ask(name, {"messages": CHAT})["choices"][0]["message"]["content"] == "GOOD DAY"
    assert ask(name, {"prompt": ["a", "b"]})["choices"][1]["text"] == "B"
    assert ask(name, {"inputs": "a"}) == [{"generated_text": "A"}]
    assert ask(name, {"inputs": CHAT}) == [{"generated_text": "GOOD DAY"}]
    said = ask(name, {"inputs": ["a", "b c"], "parameters": {"max_new_tokens": 1}})
    assert said == [{"generated_text": "A"}, {"generated_text": "B"}]


def test_an_unknown_schema_is_told_all_that_would_do(refused: Refused) -> None:
    message = refused("sagemaker", {"text": "a"}).message
    assert all(word in message for word in ('"messages"', '"prompt"', '"inputs"'))


def test_full_text_and_details(ask: Ask) -> None:
    parameters = {"return_full_text": True, "details": True, "seed": 7, "max_new_tokens": 1}
    said = ask("huggingface", {"inputs": "good day", "parameters": parameters})
    details = {
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": 7,
        "prefill": [],
        "tokens": [],
    }
    assert said == [{"generated_text": "good dayGOOD", "details": details}]


@pytest.mark.parametrize(("stop", "end"), [(None, "eos_token"), (["x"], "stop_sequence")])
def test_ends(stop: list[str] | None, end: str, ask: Ask) -> None:
    parameters = {"details": True, "stop": stop}
    said = ask("huggingface", {"inputs": "good day", "parameters": parameters})
    assert said[0]["details"]["finish_reason"] == end


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [1]},
        {"inputs": []},
        {"inputs": ["a"] * (MAX_PROMPTS + 1)},
        {"inputs": "a", "parameters": "b"},
        {"inputs": "a", "parameters": {"details": 1}},
        {"inputs": "a", "parameters": {"max_new_tokens": 0}},
        {"inputs": "a", "parameters": {"top_p": 2}},
        {"inputs": ["a", "b"], "stream": True},
        {"inputs": CHAT, "parameters": {"return_full_text": True}},
    ],
)
def test_text_generation_refuses(body: dict[str, Any], refused: Refused) -> None:
    assert refused("huggingface", body).status == 400


def test_hugging_faces_own_client(served: Callable[[str], str]) -> None:
    client = InferenceClient(model=served("huggingface") + "/", timeout=20)
    assert client.text_generation("good day", max_new_tokens=5) == "GOOD DAY"
    full = client.text_generation("good day", return_full_text=True, do_sample=False)
    assert full == "good dayGOOD DAY"
    output = client.text_generation("good day", details=True, max_new_tokens=1, seed=3)
    assert (output.generated_text, output.details.finish_reason) == ("GOOD", "length")
    assert output.details.generated_tokens == 1
    assert "".join(client.text_generation("good day", stream=True)) == "GOOD DAY"
    events = list(client.text_generation("good day", stream=True, details=True))
    assert [event.token.text for event in events] == ["GOOD", " DAY", ""]
    assert events[-1].generated_text == "GOOD DAY"
    assert events[-1].details.generated_tokens == 2
    with pytest.raises(ValidationError, match="watermark"):
        client.text_generation("good day", watermark=True)


def test_the_token_events_of_a_stream_that_breaks_off(stream: Stream) -> None:
    body = {"inputs": "good day", "stream": True}
    events = [data for _, data in stream("huggingface", body, ApiError(500, "gone"))]
    assert events[0]["token"]["text"] == "GOOD"
    assert events[-1] == {"error": "gone", "error_type": "generation"}


# KServe


def tensor(**changes: Any) -> dict[str, Any]:
    good = {"name": "text_input", "shape": [2], "datatype": "BYTES", "data": ["a", "b c"]}
    return {"id": "42", "inputs": [{**good, **changes}]}


def test_inference(ask: Ask) -> None:
    said = ask("kserve", {**tensor(), "parameters": {"max_tokens": 1}}, model="demo")
    assert said == {
        "model_name": "demo",
        "id": "42",
        "outputs": [
            {"name": "text_output", "shape": [2], "datatype": "BYTES", "data": ["A", "B"]},
            {
                "name": "finish_reason",
                "shape": [2],
                "datatype": "BYTES",
                "data": ["length", "length"],
            },
        ],
    }


def test_inference_of_a_version_and_some_outputs(ask: Ask) -> None:
    body = {**tensor(), "outputs": [{"name": "text_output"}]}
    said = ask("kserve", body, model="demo", version="1")
    assert said["model_version"] == "1"
    assert [output["name"] for output in said["outputs"]] == ["text_output"]


@pytest.mark.parametrize(
    ("shape", "data"),
    [([2, 1], ["a", "b"]), ([2, 1], [["a"], ["b"]]), ([1, 2], [["a", "b"]]), ([2], ["a", "b"])],
)
def test_tensors_flat_or_nested(shape: list[int], data: list[Any], ask: Ask) -> None:
    output = ask("kserve", tensor(shape=shape, data=data))["outputs"][0]
    assert (output["shape"], output["data"]) == (shape, ["A", "B"])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "input_ids"},
        {"datatype": "INT64"},
        {"datatype": None},
        {"shape": [3]},
        {"shape": []},
        {"shape": [0]},
        {"shape": [-1]},
        {"shape": [True, 2]},
        {"shape": [2.0]},
        {"shape": "2"},
        {"shape": [1] * 9},
        {"shape": [10**30]},
        {"shape": [2, 1], "data": [["a", "b"]]},
        {"shape": [2, 1], "data": [["a"], "b"]},
        {"data": ["a", 1]},
        {"data": "ab"},
        {"data": None},
        {"parameters": {"binary_data_size": 4}},
    ],
)
def test_a_tensor_that_is_not_what_it_says(changes: dict[str, Any], refused: Refused) -> None:
    error = refused("kserve", tensor(**changes))
    assert error.status == 400
    assert adapter("kserve").error(error)[1] == {"error": error.message}


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": []},
        {"inputs": tensor()["inputs"] * 2},
        {**tensor(), "id": 42},
        {**tensor(), "outputs": [{"name": "logits"}]},
        {**tensor(), "outputs": ["text_output"]},
        {**tensor(), "parameters": {"stream": True}},
        {**tensor(), "parameters": {"n": 2}},
        {**tensor(), "parameters": {"binary_data_output": True}},
    ],
)
def test_inference_refuses(body: dict[str, Any], refused: Refused) -> None:
    assert refused("kserve", body).status == 400


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("invoke", lambda model: {"prompt": "a", "model": model}),
        ("openai", lambda model: {"prompt": "a", "model": model}),
        ("sagemaker", lambda model: {"inputs": "a", "model": model}),
        ("huggingface", lambda model: {"inputs": "a", "model": model}),
        ("vertex", lambda model: {"instances": ["b", {"prompt": "a", "model": model}]}),
        ("vertex", lambda model: {"prompt": "a", "model": model}),
        ("cog", lambda model: {"input": {"prompt": "a", "model": model}}),
        ("runpod", lambda model: {"prompt": "a", "model": model}),
        ("runpod", lambda model: {"messages": [{"role": "user", "content": "a"}], "model": model}),
    ],
)
def test_a_body_may_say_which_model_is_meant(
    name: str, body: Callable[[object], object], ask: Ask, refused: Refused
) -> None:
    assert ask(name, body("demo")) is not None
    assert ask(name, body(None)) is not None
    assert refused(name, body("other")).status == 404


def test_a_version_or_model_that_there_is_not(refused: Refused) -> None:
    assert refused("kserve", tensor(), model="demo", version="2").status == 404
    assert refused("kserve", tensor(), model="other").status == 404


# Cog


def test_predictions(ask: Ask) -> None:
    said = ask("cog", {"input": {"prompt": "good day"}})
    assert said["metrics"].pop("predict_time") >= 0
    assert said == {
        "status": "succeeded",
        "output": "GOOD DAY",
        "error": None,
        "logs": "",
        "metrics": {"input_token_count": 3, "output_token_count": 2},
    }


def test_predictions_have_the_clients_id(ask: Ask) -> None:
    body = {"input": {"prompt": "a"}, "id": "mine"}
    assert ask("cog", body)["id"] == "mine"
    assert ask("cog", body, prediction_id="path")["id"] == "path"


@pytest.mark.parametrize(
    ("given_", "output"),
    [
        ({"messages": CHAT}, "GOOD DAY"),
        ({"prompt": "a b", "system_prompt": "be brief"}, "A B"),
        ({"prompt": "a b", "system_prompt": ""}, "A B"),
        ({"prompt": "a b", "max_new_tokens": 1, "stop_sequences": "x,y", "top_k": -1}, "A"),
        ({"prompt": "a", "n": 2}, ["A", "A"]),
    ],
)
def test_inputs_of_predictions(given_: dict[str, Any], output: object, ask: Ask) -> None:
    assert ask("cog", {"input": given_})["output"] == output


def test_stops_of_predictions_are_a_string_with_commas() -> None:
    body = {"input": {"prompt": "a", "stop_sequences": "<end>,<stop>"}}
    assert body_of("cog", body)["stop"] == ["<end>", "<stop>"]
    assert "stop" not in body_of("cog", {"input": {"prompt": "a", "stop_sequences": ""}})


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": {"prompt": 1}},
        {"input": {"prompt": "a", "messages": CHAT}},
        {"input": {"messages": CHAT, "system_prompt": "x"}},
        {"input": {"prompt": "a", "system_prompt": 1}},
        {"input": {"prompt": "a"}, "id": 5},
        {"input": {"prompt": "a"}, "webhook": "http://127.0.0.1/"},
        {"input": {"prompt": "a"}, "output_file_prefix": "http://127.0.0.1/"},
    ],
)
def test_predictions_refused(body: dict[str, Any], refused: Refused) -> None:
    error = refused("cog", body)
    status, document = adapter("cog").error(error)
    assert status == 422
    assert document["detail"][0]["loc"][0] == "body"  # type: ignore[index]
    assert document["detail"][0]["msg"] == error.message  # type: ignore[index]


def test_predictions_stream(stream: Stream) -> None:
    body = {"input": {"prompt": "good day"}, "id": "x"}
    events = stream("cog", body, sse=True)
    assert [name for name, _ in events] == ["start", "output", "output", "completed"]
    assert events[0][1] == {"id": "x", "status": "processing"}
    assert events[1][1] == {"chunk": "GOOD", "index": 0}
    done = events[-1][1]
    assert (done["status"], done["output"]) == ("succeeded", ["GOOD", " DAY"])
    assert done["metrics"]["output_token_count"] == 2
    broken = stream("cog", body, ApiError(500, "gone"), sse=True)[-1][1]
    assert (broken["status"], broken["error"]) == ("failed", "gone")


# RunPod's jobs


def test_jobs(ask: Ask) -> None:
    said = ask("runpod", {"prompt": "good day", "sampling_params": {"max_tokens": 1, "n": 2}})
    assert said == {
        "choices": [{"tokens": ["GOOD"]}, {"tokens": ["GOOD"]}],
        "usage": {"input": 3, "output": 2},
    }


def test_jobs_of_chats() -> None:
    for given_ in ({"messages": CHAT}, {"prompt": "good day", "apply_chat_template": True}):
        requests = adapter("runpod").read({**given_, "stream": True})
        ((kind, body),) = requests.items
        assert (kind, body["messages"], requests.stream) == ("chat", CHAT, True)


def test_jobs_in_openais_words(ask: Ask) -> None:
    job = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": CHAT}}
    assert ask("runpod", job)["object"] == "chat.completion"


@pytest.mark.parametrize(
    "job",
    [
        {"prompt": ["a"]},
        {"prompt": "a", "messages": CHAT},
        {"prompt": "a", "sampling_params": []},
        {"prompt": "a", "stream": 1},
        {"prompt": "a", "sampling_params": {"use_beam_search": True}},
        {"openai_route": "/etc/passwd", "openai_input": {}},
        {"openai_route": ["/v1/completions"], "openai_input": {}},
        {"openai_route": "/v1/completions", "openai_input": "x"},
    ],
)
def test_jobs_refused(job: dict[str, Any], refused: Refused) -> None:
    assert refused("runpod", job).status == 400
