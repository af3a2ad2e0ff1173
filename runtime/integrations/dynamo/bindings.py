"""Dynamo's Python bindings: what of them is used, in one place. Importing them takes a while."""

from __future__ import annotations

from typing import Any

from coldframe.runtime.gateway.api import ApiError

__all__ = ["Bindings"]


class Bindings:
    """Imports them."""

    def __init__(self) -> None:
        from dynamo import llm, runtime
        from dynamo.llm import exceptions

        self.DistributedRuntime: Any = runtime.DistributedRuntime
        self.KvEventPublisher: Any = llm.KvEventPublisher
        self.ModelInput: Any = llm.ModelInput
        self.ModelRuntimeConfig: Any = llm.ModelRuntimeConfig
        self.ModelType: Any = llm.ModelType
        self.WorkerMetricsPublisher: Any = llm.WorkerMetricsPublisher
        self.WorkerType: Any = llm.WorkerType
        self.register_model: Any = llm.register_model
        self._exceptions: Any = exceptions

    def error(self, error: ApiError) -> Exception:
        """What Dynamo understands of an error of ours.

        A client's mistake is told to it. What another worker may do better is what Dynamo takes
        for the end of this one's engine: where its front end migrates requests, another goes on
        with them, and with the tokens that their clients have.
        """
        if error.status in (429, 503):
            kind = self._exceptions.EngineShutdown
        elif 400 <= error.status < 500:
            kind = self._exceptions.InvalidArgument
        else:
            kind = self._exceptions.Unknown
        made: Exception = kind(error.message)
        return made
