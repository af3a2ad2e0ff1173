"""A worker of Dynamo's: registered as soon as the model's config is known, until it is to end.

It is registered before the weights are there, and stays so at zero: a request that comes meanwhile
waits in the gateway's line. It leaves in this order: out of the discovery; a moment later, when no
front end sends it anything any more, the line is closed; when the last request has its answer the
runtime is shut down.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from contextlib import suppress
from typing import Any

from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.engine import FrontEngine
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.integrations.dynamo.bindings import Bindings
from coldframe.runtime.integrations.dynamo.handler import Handler
from coldframe.runtime.integrations.dynamo.publishing import KvEvents, LoadCount
from coldframe.runtime.integrations.dynamo.settings import DynamoSettings

__all__ = ["DynamoWorker"]

_RETRY_S = 1.0
_SIZED_S = 5.0
_LOOK_S = 0.05
_LAST_S = 3.0
"""How long Dynamo's runtime may take to let go, in seconds."""
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What front ends read of a model."""


class DynamoWorker:
    """One model, registered.

    Args:
        settings: How it is known.
        engine: Answers; its first model is meant.
        log: Gets what happens.
    """

    def __init__(self, settings: DynamoSettings, engine: FrontEngine, log: Log) -> None:
        self._settings = settings
        self._engine = engine
        self._log = log
        self._name = engine.default.name
        self._runtime: Any = None
        self._endpoint: Any = None
        self._served: asyncio.Future[None] | None = None
        self._handler: Handler | None = None
        self._leaving = False
        self._files: str | None = None
        """A directory with the small files of a model that is in none of its own."""

    async def run(self) -> None:
        """Serves until `leave`, or until Dynamo's runtime ends by itself.

        Raises:
            Exception: It cannot be registered, or is not any more.
        """
        bindings = await asyncio.to_thread(Bindings)
        card = await self._card()
        facts = await self._facts()
        if self._leaving:
            return
        settings = self._settings
        if settings.event_plane is not None:
            os.environ["DYN_EVENT_PLANE"] = settings.event_plane
        runtime = self._runtime = bindings.DistributedRuntime(
            asyncio.get_running_loop(), settings.discovery, settings.request_plane
        )
        endpoint = self._endpoint = runtime.endpoint(settings.path)
        publisher = bindings.WorkerMetricsPublisher()
        await publisher.create_endpoint(endpoint)
        load = LoadCount(publisher)
        handler = self._handler = Handler(
            settings.role, self._name, self._engine, load, bindings.error
        )
        serving = endpoint.serve_endpoint(handler.generate, graceful_shutdown=True)
        self._served = asyncio.ensure_future(serving)
        await bindings.register_model(
            bindings.ModelInput.Tokens,
            **self._place(bindings, card),
            endpoint=endpoint,
            model_path=self._directory(facts),
            model_name=self._name,
            kv_cache_block_size=facts["block_tokens"],
            runtime_config=self._runtime_config(bindings, card, facts),
            custom_template_path=settings.chat_template,
            ignore_weights=True,
        )
        if settings.role != "decode":
            events = bindings.KvEventPublisher(
                endpoint, kv_block_size=facts["block_tokens"], enable_local_indexer=True
            )
            self._engine.on_kv_events = KvEvents(events).take
        self._log.info("registered", path=settings.path, role=settings.role, model=self._name)
        await asyncio.shield(self._served)
        if not self._leaving:
            raise RuntimeError("Dynamo's runtime has ended")

    async def leave(self) -> None:
        """Leaves the discovery, and returns when front ends have heard of that."""
        self._leaving = True
        if self._endpoint is None:
            return
        try:
            async with asyncio.timeout(_LAST_S):
                await self._endpoint.unregister_endpoint_instance()
        except Exception as error:  # noqa: BLE001 - whatever it is, this worker ends
            self._log.warning("still in the discovery", why=str(error))
        await asyncio.sleep(self._settings.grace_s)

    async def close(self) -> None:
        """Waits for the last answers, and lets go of the runtime."""
        self._leaving = True
        if self._handler is not None:
            await self._handler.until_idle()
        if self._runtime is not None:
            self._runtime.shutdown()
        if self._served is not None:
            with suppress(Exception):
                async with asyncio.timeout(_LAST_S):
                    await asyncio.shield(self._served)
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)

    async def _card(self) -> ModelCard:
        """The model's card, as soon as its config is there."""
        while True:
            try:
                return await self._engine.card(self._name)
            except ApiError as error:
                if error.retry_after_s is None and error.code != "deadline":
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _facts(self) -> dict[str, Any]:
        """What the front tells of the model, with the number of its KV blocks where there is one.

        A router cannot know how full a worker is that has not said how much there is.
        """
        late = time.monotonic() + _SIZED_S
        while True:
            facts = await self._engine.default.ask("registration")
            if self._leaving or not facts["soon"] or time.monotonic() > late:
                return facts
            await asyncio.sleep(_LOOK_S)

    def _place(self, bindings: Bindings, card: ModelCard) -> dict[str, Any]:
        """What kind of worker it is, and whom it needs beside it."""
        kinds, workers = bindings.ModelType, bindings.WorkerType
        if self._settings.role == "prefill":
            needs = [[workers.Decode]]
            return {"model_type": kinds.Prefill, "worker_type": workers.Prefill, "needs": needs}
        model_type = kinds.Completions
        if card.chat_template is not None:
            model_type = kinds.Chat | kinds.Completions
        if self._settings.role == "decode":
            needs = [[workers.Prefill]]
            return {"model_type": model_type, "worker_type": workers.Decode, "needs": needs}
        return {"model_type": model_type, "worker_type": workers.Aggregated}

    def _runtime_config(self, bindings: Bindings, card: ModelCard, facts: dict[str, Any]) -> Any:
        config = bindings.ModelRuntimeConfig()
        config.context_length = card.context_length
        tells = self._settings.role != "decode"  # whose router looks for no blocks
        config.enable_local_indexer = config.kv_event_publishing_enabled = tells
        if facts["kv_blocks"] is not None:
            config.total_kv_blocks = facts["kv_blocks"]
        config.max_num_seqs = self._settings.most_running
        config.max_num_batched_tokens = card.context_length
        return config

    def _directory(self, facts: dict[str, Any]) -> str:
        """Where front ends find the model's small files, for as long as this worker is registered.

        A model from elsewhere has them in a directory that goes with each replica.
        """
        directory = str(facts["directory"])
        if facts["lasting"]:
            return directory
        self._files = tempfile.mkdtemp(prefix="coldframe-dynamo-")
        for name in _SMALL_FILES:
            with suppress(FileNotFoundError):
                shutil.copy(os.path.join(directory, name), self._files)
        os.chmod(self._files, 0o755)
        return self._files
