"""vLLM starts before its weights are in, and computes with each layer as it comes."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.stages import stage_names
from tests.runtime.integrations.vllm.held import Held
from tests.runtime.integrations.vllm.hosts import HostError, host

pytestmark = pytest.mark.vllm

PROMPTS = [[5], list(range(20, 60)), [i % 1000 + 2 for i in range(300)]]


def gated(demo, source, **more):
    extra = {"gated": True, **more.pop("extra", {})}
    if source is not None:
        extra["source"] = source.url
    return host(demo, load_format="coldframe", model_loader_extra_config=extra, **more)


@pytest.fixture(scope="module")
def plain(own):
    """What vLLM's own loader makes of the demo model."""
    return own.generate(PROMPTS, max_tokens=12)


def test_tokens_are_those_of_plain_vllm(demo_model, plain, tmp_path):
    spans, found, again = _in_steps(demo_model(), "float32", tmp_path / "reached")
    assert found == again == plain
    # Each layer was gone through while the next one was not even there.
    filled = {name[4:]: end for name, _, end in spans if name.startswith("fill")}
    passed = {name[4:]: end for name, _, end in spans if name.startswith("gate")}
    assert list(filled) == list(passed) == [f"[{name}]" for name in stage_names(4)]
    assert all(end >= filled[name] for name, end in passed.items())
    for name, later in pairwise(filled):
        assert passed[name] < filled[later]


def test_a_tied_head_and_packed_weights(demo_model, tmp_path):
    model = demo_model("qwen3", "bfloat16")
    _, found, again = _in_steps(model, "bfloat16", tmp_path / "reached")
    with host(model, dtype="bfloat16") as engine:
        assert found == again == engine.generate(PROMPTS, max_tokens=12)


def _in_steps(model, dtype, reached):
    """What comes of prompts that are there before any weights, which then come stage by stage.

    Each comes when the first pass waits for it; `reached` is a file's path, for what is known of
    the pass.
    """
    with Held(model) as source, gated(model, source, dtype=dtype) as engine:
        assert not engine.call(_complete)
        assert engine.call(_rehearse) == (7, 7, True)
        assert engine.call(_tiles) == ("amx_tile" in Path("/proc/cpuinfo").read_text())
        engine.call(_watch, str(reached))
        for number, prompt in enumerate(PROMPTS):
            engine.add(str(number), prompt, max_tokens=12)
        engine.begin("run")
        for stage in range(source.stages):
            deadline = time.monotonic() + 30
            while reached.stat().st_size <= stage:
                assert time.monotonic() < deadline, f"nothing has reached stage {stage}"
                time.sleep(0.02)
            source.release(stage)
        answers = engine.answer()
        again = engine.generate(PROMPTS, max_tokens=12)
        assert engine.call(_what_is_left) == []
        reasons = engine.call(_refusals)
        assert len(set(reasons.values())) == len(reasons)
        assert None not in reasons.values()
        return engine.call(_spans), [answers[str(number)] for number in range(3)], again


def test_a_source_that_is_gone(demo_model):
    """A request that waits for weights ends with the reason, and so does one that comes later."""
    model = demo_model()
    with Held(model, upto=2) as source, gated(model, source, dtype="float32") as engine:
        engine.add("waits", PROMPTS[1])
        engine.begin("run")
        time.sleep(0.5)
        source.vanish()
        began = time.monotonic()
        with pytest.raises(HostError, match="SourceNotFound"):
            engine.answer()
        assert time.monotonic() - began < 30
        engine.add("later", PROMPTS[0])
        with pytest.raises(HostError, match="SourceNotFound"):
            engine.ask("run", wait_s=30)


def test_a_memory_service_that_is_gone(demo_model):
    model = demo_model()
    # The size of the KV cache is explicit by VLLM_CPU_KVCACHE_SPACE, too.
    by_space = {"dtype": "float32", "kv_cache_memory_bytes": None}
    with Held(model) as source, gated(model, source, **by_space) as engine:
        engine.add("waits", PROMPTS[1])
        engine.begin("run")
        time.sleep(0.5)
        engine_children(engine)[0].kill()
        with pytest.raises(HostError, match="MemoryServiceGone"):
            engine.answer(wait_s=20)


def test_the_core_in_a_process_of_its_own(demo_model, plain):
    """As in `vllm serve`."""
    model = demo_model()
    separate = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        Held(model, upto=1) as source,
        gated(model, source, dtype="float32", environment=separate) as engine,
    ):
        engine.add("0", PROMPTS[1], max_tokens=12)
        engine.begin("run")
        time.sleep(1.0)
        source.release()
        assert engine.answer()["0"] == plain[1]
        engine.call(_shut_down)  # the core would outlive a process that just ends


def test_a_compiled_model_is_loaded_first(demo_model, plain, tmp_path):
    compiled = {
        "enforce_eager": False,
        "compilation_config": {"mode": 1, "backend": "eager", "cudagraph_mode": "NONE"},
        "dtype": "float32",
    }
    model, log = demo_model(), tmp_path / "log"
    extra = {"gated": True}
    with pytest.raises(HostError, match="cannot start before its weights are in"):
        gated(model, None, extra=extra, **compiled).__enter__()
    told = {"VLLM_LOGGING_LEVEL": "INFO"}
    with gated(
        model, None, extra={"gated": "auto"}, log=log, environment=told, **compiled
    ) as engine:
        assert engine.call(_load) is None
        assert engine.generate(PROMPTS, max_tokens=12) == plain
    said = [line for line in log.read_text().splitlines() if "Waiting for all weights" in line]
    assert len(said) == 1
    assert "the model is compiled" in said[0]


def engine_children(engine):
    import psutil

    found = psutil.Process(engine.process.pid).children(recursive=True)
    return [
        child for child in found if "loader.memory_service.service" in " ".join(child.cmdline())
    ]


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


def _shut_down(engine):
    engine.engine_core.shutdown()


def _load(engine):
    from coldframe.runtime.integrations.vllm.gated import gated_load

    return gated_load(_model(engine))


def _model(engine):
    executor = engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model


def _tiles(engine):
    """Whether this process may use AMX, with nothing computed yet."""
    from coldframe.snapshot.xstate import granted

    return bool(granted() >> 18 & 1)


def _watch(engine, path):
    """From now on a file has a byte for each gate that a pass is through, or waits at."""
    gates = _load(engine).gates

    def watch():
        while not gates.gone:
            waits = len(gates._changed._waiters) > 0
            Path(path).write_bytes(b"." * (len(gates._passed) + waits))
            time.sleep(0.02)

    Path(path).touch()
    threading.Thread(target=watch, daemon=True).start()


def _rehearse(engine):
    """A run of nobody's, as there are while an engine starts: it waits for nothing."""
    import torch

    model = _model(engine)
    executor = engine.engine_core.engine_core.model_executor
    hidden, _ = executor.driver_worker.worker.model_runner._dummy_run(7)
    logits = model.compute_logits(hidden)
    return len(hidden), len(logits), not torch.count_nonzero(hidden) and not logits.any()


def _complete(engine):
    return _load(engine).complete


def _spans(engine):
    return [(span.name, span.start_ns, span.end_ns) for span in _load(engine).spans()]


def _what_is_left(engine):
    """Hooks and stand-ins that the gates should have taken with them."""
    model = _model(engine)
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    return hooks + [name for name in ("forward", "compute_logits") if name in vars(model)]


def _refusals(engine):
    """What is said of configurations that are this engine's, but for one thing."""
    from coldframe.runtime.integrations.vllm.gated import refusal

    config = engine.vllm_config
    assert refusal(config) is None
    changes = {
        "kv": (config.cache_config, "kv_cache_memory_bytes", None),
        "pp": (config.parallel_config, "pipeline_parallel_size", 2),
        "dp": (config.parallel_config, "data_parallel_size", 2),
        "eplb": (config.parallel_config, "enable_eplb", True),
        "sleep": (config.model_config, "enable_sleep_mode", True),
        "pooling": (config.model_config, "runner_type", "pooling"),
        "draft": (config, "speculative_config", object()),
        "lora": (config, "lora_config", object()),
        "quantised": (config, "quant_config", object()),
        "exchange": (config, "weight_transfer_config", object()),
        "offload": (config.offload_config.uva, "cpu_offload_gb", 1.0),
        "compiled": (config.compilation_config, "mode", 3),
    }
    found = {}
    for name, (where, attribute, value) in changes.items():
        before = getattr(where, attribute)
        object.__setattr__(where, attribute, value)
        found[name] = refusal(config)
        object.__setattr__(where, attribute, before)
    return found
