"""A worker: prompts computed, tokens decoded, KV held and handed on."""
