"""Gates by themselves, in a model of torch's: who waits, for how long, and what is left of them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from coldframe.loader.errors import ReplicaError, SourceChanged

pytestmark = pytest.mark.vllm


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(5, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 5)
        self.reached = []

    def forward(self, input_ids, positions):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            self.reached.append(len(self.reached))
            hidden = layer(hidden)
        return self.norm(hidden)

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)


@pytest.fixture
def model():
    return Model().eval().requires_grad_(False)


def shut(model, **more):
    import vllm.forward_context  # noqa: F401 - takes seconds the first time

    from coldframe.runtime.integrations.vllm.gates import Gates
    from coldframe.runtime.integrations.vllm.staged import Staged

    return Gates(Staged(model, range(4)), None, lambda: 0, **more)


def until(there, seconds=10):
    """Waits until something is so."""
    late = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < late
        time.sleep(0.01)


def started(model):
    """A pass through the model in a thread, and what comes of it."""
    found = []
    inputs = torch.tensor([1, 2])

    def run():
        try:
            found.append(model.compute_logits(model(inputs, positions=inputs)))
        except Exception as error:  # noqa: BLE001 - the test is to see it
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_each_stage_is_waited_for_and_nothing_is_left(model):
    inputs = torch.tensor([1, 2])
    expected = model.compute_logits(model(inputs, positions=inputs))
    model.reached.clear()
    gates = shut(model)
    thread, found = started(model)
    for stage, reached in enumerate([0, 1, 2, 2]):
        until(lambda reached=reached: len(model.reached) == reached)
        time.sleep(0.05)  # were there no gate, it would get on
        assert len(model.reached) == reached
        assert not found
        gates.open(stage)
    thread.join(10)
    assert torch.equal(found[0], expected)
    called = []
    gates.remove(lambda: called.append(True))
    assert called
    assert gates.gone
    assert gates.wait_all(0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not {"forward", "compute_logits"} & set(vars(model))


def test_a_wait_ends_where_nothing_comes(model):
    gates = shut(model, stall_s=0.3)
    with pytest.raises(ReplicaError, match="do not come"):
        gates.wait(1)


def test_a_failure_ends_all_waits_and_what_is_open_stays_so(model):
    gates = shut(model)
    gates.open(0)
    thread, found = started(model)
    time.sleep(0.1)
    gates.fail(SourceChanged("the file changed", where="shard 1"))
    thread.join(10)
    assert isinstance(found[0], SourceChanged)
    assert found[0].where == "shard 1"
    gates.wait(0)
    for ask in (lambda: gates.wait(3), lambda: gates.wait_all(0)):
        with pytest.raises(SourceChanged):
            ask()


def test_weights_are_not_moved_under_a_pass(model):
    gates = shut(model)
    for stage in range(3):
        gates.open(stage)
    thread, found = started(model)  # waits before the norm, within forward
    until(gates._running.locked)
    moved = []
    remover = threading.Thread(target=gates.remove, args=[lambda: moved.append(bool(found))])
    remover.start()
    time.sleep(0.1)
    assert not moved
    gates.open(3)
    thread.join(10)
    remover.join(10)
    assert moved


class Filled:
    """What fills a model that has its weights already."""

    stages = range(4)

    def has(self, parameter):
        return True

    def fill(self, stage):
        pass

    process = fill

    def finish(self):
        pass

    def summary(self):
        return "nothing"


def test_a_load_is_known_by_its_model_alone(model):
    from coldframe.runtime.integrations.vllm.gated import GatedLoad, gated_load
    from coldframe.runtime.integrations.vllm.staged import Staged

    assert gated_load(model) is None
    client = SimpleNamespace(progress=(0, 0))
    made = GatedLoad(Staged(model, range(4)), Filled(), client, None, torch.device("cpu"))
    assert gated_load(model) is made
    assert made.wait(10)
    made._thread.join(10)
    known = weakref.ref(made)
    del made, model.coldframe_gated_load
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("stages", [3, 5])
def test_another_checkpoint_is_no_fit(model, stages):
    from coldframe.runtime.integrations.vllm.staged import Staged

    assert "other layers" in Staged(model, range(stages)).unfit()


def test_weights_that_layers_share_are_no_fit(model):
    from coldframe.runtime.integrations.vllm.staged import Staged

    model.lm_head = model.embed_tokens
    model.layers[1].weight = model.layers[0].weight
    assert "shares weights" in str(Staged(model, range(4))._shared())
