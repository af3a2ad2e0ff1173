"""What kind of work a stage is: the few groups that pictures give colours to."""

from __future__ import annotations

import re

from coldframe.runtime.timeline.timeline import UNATTRIBUTED

__all__ = ["GROUPS", "group_of", "stage_of"]

GROUPS = {
    "provision": "processes and imports",
    "restore": "snapshots restored",
    "weights": "weights read and placed",
    "engine": "engine made ready",
    "request": "the request itself",
    UNATTRIBUTED: "unattributed",
}
"""The groups in the order of a start, and what a legend says of each."""

_INDEXED = re.compile(r"(.*)\[(.*)\]", re.DOTALL)
_BY_STAGE = {
    "provision": "interpreter imports process_spawn listen cuda_context scale",
    "restore": "snapshot hooks graph_restore cuda_checkpoint cuda_restore cuda_unlock cuda_lock",
    "weights": "checkpoint_open plan weight_read stage_ready fill verify attach realign"
    " vllm_weights",
    "engine": "kv_alloc tokenizer ready warmup graph_capture graph_save graph_trial"
    " attention_trial pauses vllm_config vllm_engine vllm_kv vllm_warmup vllm_failed vllm_lets_go",
    "request": "tokenize prefill first_token handoff decode last_token wait queue recomputed"
    " takeover",
}
_STAGES = {stage: group for group, stages in _BY_STAGE.items() for stage in stages.split()}
_PREFIXES = {"snapshot_": "restore", "cuda_": "restore", "vllm_": "engine", "kv_": "request"}
_PROCESSES = {"front": "provision", "memory": "weights", "snapshot": "restore"}


def stage_of(name: str) -> str:
    """A stage's name without its number: `prefill` for `prefill[3]`."""
    match = _INDEXED.fullmatch(name)
    return name if match is None else match[1]


def group_of(name: str, process: str) -> str:
    """The group that a stage belongs to; what nobody has heard of is what its process is for."""
    if name == UNATTRIBUTED:
        return UNATTRIBUTED
    stage = stage_of(name).partition(",")[0]
    if stage in _STAGES:
        return _STAGES[stage]
    for prefix, group in _PREFIXES.items():
        if stage.startswith(prefix):
            return group
    return _PROCESSES.get(process, "engine")
