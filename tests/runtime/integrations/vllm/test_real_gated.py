"""vLLM starts before its weights are in, and computes with each layer as it comes."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from coldframe.loader.stages import stage_names
from tests.runtime.integrations.vllm.held import Held
from tests.runtime.integrations.vllm.hosts import HostError, host

pytestmark = pytest.mark.vllm

PROMPTS = [[5], list(range(20, 60)), [i % 1000 + 2 for i in range(300)]]


def gated(demo, source, **more):
    extra = {"source": source.url, "gated": True, **more.pop("extra", {})}
    return host(demo, load_format="coldframe", model_loader_extra_config=extra, **more)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16")], ids=["llama", "tied-bf16"]
)
def test_tokens_are_those_of_plain_vllm(demo_model, family, dtype):
    model = demo_model(family, dtype)
    with Held(model) as source, gated(model, source, dtype=dtype) as engine:
        # It is up, and most of its weights are not there.
        assert not engine.call(_complete)
        for number, prompt in enumerate(PROMPTS):
            engine.add(str(number), prompt, max_tokens=12)
        engine.begin("run")
        for stage in range(source.stages):
            time.sleep(0.2)
            source.release(stage)
        found = engine.answer()
        spans = engine.call(_spans)
        again = engine.generate(PROMPTS, max_tokens=12)
        assert engine.call(_what_is_left) == []
    with host(model, dtype=dtype) as engine:
        plain = engine.generate(PROMPTS, max_tokens=12)
    assert [found[str(number)] for number in range(3)] == plain
    assert again == plain
    # Layers were gone through while later ones were not even there.
    filled = {name[4:]: end for name, _, end in spans if name.startswith("fill")}
    passed = {name[4:]: end for name, _, end in spans if name.startswith("gate")}
    assert list(filled) == list(passed) == [f"[{name}]" for name in stage_names(4)]
    assert all(end >= filled[name] for name, end in passed.items())
    for name, later in pairwise(filled):
        assert passed[name] < filled[later]


def test_a_source_that_is_gone(demo_model):
    """A request that waits for weights ends with the reason, and so does each that comes later."""
    with Held(demo_model(), upto=2) as source:
        with gated(demo_model(), source, dtype="float32") as engine:
            engine.add("waits", PROMPTS[1])
            engine.begin("run")
            time.sleep(0.5)
            source.vanish()
            began = time.monotonic()
            with pytest.raises(HostError, match="SourceNotFound"):
                engine.answer()
            assert time.monotonic() - began < 20
            with pytest.raises(HostError, match="SourceNotFound"):
                engine.ask("run")


def test_a_memory_service_that_is_gone(demo_model):
    with Held(demo_model()) as source, gated(demo_model(), source, dtype="float32") as engine:
        engine.add("waits", PROMPTS[1])
        engine.begin("run")
        time.sleep(0.5)
        engine_children(engine)[0].kill()
        with pytest.raises(HostError, match="MemoryServiceGone"):
            engine.answer(wait_s=20)


def engine_children(engine):
    import psutil

    found = psutil.Process(engine.process.pid).children(recursive=True)
    return [child for child in found if "loader.service" in " ".join(child.cmdline())]


def test_an_engine_that_ends_while_a_gate_waits(demo_model):
    """An interrupt reaches whoever waits at a gate, and nothing keeps the process."""
    with Held(demo_model()) as source, gated(demo_model(), source, dtype="float32") as engine:
        engine.add("waits", PROMPTS[1])
        engine.begin("run")
        time.sleep(0.5)
        children = engine_children(engine)
        engine.process.send_signal(2)
        engine.process.wait(20)
        for child in children:
            child.wait(20)


def _load(engine):
    from coldframe.runtime.integrations.vllm.gated import gated_load

    return gated_load(_model(engine))


def _model(engine):
    executor = engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model


def _complete(engine):
    return _load(engine).complete


def _spans(engine):
    return [(span.name, span.start_ns, span.end_ns) for span in _load(engine).spans()]


def _what_is_left(engine):
    """Hooks and stand-ins that the gates should have taken with them."""
    model = _model(engine)
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    return hooks + [name for name in ("forward", "compute_logits") if name in vars(model)]
