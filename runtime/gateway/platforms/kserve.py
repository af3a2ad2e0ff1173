"""KServe's open inference protocol, version 2: tensors of text in, tensors of text out.

    {"id"?, "inputs": [{"name": "text_input", "shape": [2], "datatype": "BYTES",
                        "data": ["...", "..."]}], "parameters"?: {...}, "outputs"?: [{"name"}]}
    {"model_name", "id"?, "outputs": [{"name": "text_output", "shape": [2], ...}, ...]}

One generation for each element. Source: open-inference-protocol, inference_rest.md. The names of
the tensors are those of Triton's own backends for language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Events, OpenAIEvents, Requests
from coldframe.runtime.gateway.platforms.parameters import (
    MAX_PROMPTS,
    choice_text,
    mapping,
    openai_parameters,
    refused,
    switch,
)

__all__ = ["INPUTS", "OUTPUTS", "VERSION", "KServeAdapter"]

VERSION = "1"
"""There is one of each model; a path may name it."""

_MOST_AXES = 4

INPUTS = ({"name": "text_input", "datatype": "BYTES", "shape": [-1]},)
OUTPUTS = (
    {"name": "text_output", "datatype": "BYTES", "shape": [-1]},
    {"name": "finish_reason", "datatype": "BYTES", "shape": [-1]},
)
"""Both as a model's metadata has them."""


class KServeAdapter:
    """Inference bodies; strict, since a tensor that is not what it says is a client's bug."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        path = path or {}
        version = path.get("version", VERSION)
        if version != VERSION:
            raise ApiError(404, f"There is no version {version!r:.100} of this model; there is 1.")
        fields = mapping(body, "The body")
        name = fields.get("id")
        if name is not None and not isinstance(name, str):
            raise refused("id must be a string.", "id")
        given = mapping(fields.get("parameters"), "parameters")
        if switch(given, "stream"):
            raise refused("There is no stream in this protocol.", "parameters.stream")
        if given.get("binary_data_output"):
            raise refused("Tensors are JSON here, not binary data.", "parameters")
        parameters = openai_parameters(given)
        if parameters.get("n", 1) != 1:
            raise refused("An element has one answer: n can only be 1.", "parameters.n")
        if "model" in path:
            parameters["model"] = path["model"]
        shape, texts = _tensor(fields.get("inputs"))
        items = tuple(("completion", {**parameters, "prompt": text}) for text in texts)
        notes = {
            "id": name,
            "shape": shape,
            "outputs": _wanted(fields.get("outputs")),
            "version": path.get("version"),
        }
        return Requests(items, notes=notes)

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        choices = [answer["choices"][0] for answer in answers]
        data = {
            "text_output": [choice_text(choice) for choice in choices],
            "finish_reason": [str(choice.get("finish_reason")) for choice in choices],
        }
        version, name = requests.notes["version"], requests.notes["id"]
        document: dict[str, Any] = {"model_name": answers[0].get("model")}
        if version is not None:
            document["model_version"] = version
        if name is not None:
            document["id"] = name
        document["outputs"] = [
            {
                "name": output,
                "shape": requests.notes["shape"],
                "datatype": "BYTES",
                "data": data[output],
            }
            for output in requests.notes["outputs"]
        ]
        return document

    def error(self, error: ApiError) -> tuple[int, object]:
        return error.status, {"error": error.message}

    def events(self, requests: Requests) -> Events:
        return OpenAIEvents()  # nothing is ever streamed


def _tensor(inputs: object) -> tuple[list[int], list[str]]:
    """The shape and the elements of the one input."""
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise refused("inputs must be a list of one tensor, text_input.", "inputs")
    tensor = mapping(inputs[0], "inputs[0]")
    if tensor.get("name") != "text_input":
        raise refused(
            f"There is no input {tensor.get('name')!r:.100}; it must be text_input.",
            "inputs[0].name",
        )
    if tensor.get("datatype") != "BYTES":
        raise refused("The datatype of text_input is BYTES.", "inputs[0].datatype")
    if mapping(tensor.get("parameters"), "inputs[0].parameters").get("binary_data_size"):
        raise refused("Tensors are JSON here, not binary data.", "inputs[0].parameters")
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= _MOST_AXES
        or not all(type(size) is int and size > 0 for size in shape)
    ):
        raise refused(
            f"shape must be a list of 1 to {_MOST_AXES} sizes above zero.", "inputs[0].shape"
        )
    count = 1
    for size in shape:
        count *= size
    if count > MAX_PROMPTS:
        raise refused(f"A tensor may have at most {MAX_PROMPTS} elements.", "inputs[0].shape")
    data = tensor.get("data")
    flat = _flattened(data, shape)
    if len(flat) != count:
        raise refused(
            f"shape {shape} has {count} elements, data has {len(flat)}.", "inputs[0].data"
        )
    if not all(isinstance(item, str) for item in flat):
        raise refused("data must be strings.", "inputs[0].data")
    return shape, flat


def _flattened(data: object, shape: Sequence[int]) -> list[Any]:
    """The elements in row-major order. The lists may be nested, then as the shape is."""
    if isinstance(data, list) and not any(isinstance(item, list) for item in data):
        return data
    rows: list[Any] = [data]
    for size in shape:
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            raise refused(f"data is no tensor of shape {list(shape)}.", "inputs[0].data")
        rows = [item for row in rows for item in row]
    return rows


def _wanted(outputs: object) -> list[str]:
    """The names of the outputs that are asked for; all, where none is."""
    known = [str(output["name"]) for output in OUTPUTS]
    if outputs is None or outputs == []:
        return known
    if not isinstance(outputs, list) or not all(isinstance(item, dict) for item in outputs):
        raise refused("outputs must be a list of objects.", "outputs")
    names = [item.get("name") for item in outputs]
    for name in names:
        if name not in known:
            raise refused(
                f"There is no output {name!r:.100}; there are {', '.join(known)}.", "outputs"
            )
    return list(dict.fromkeys(names))
