"""vLLM as the throughput engine: its weights from our memory, its KV from our prefill.

Nothing is imported here: vLLM looks for the plug-in in each of its processes.
"""
