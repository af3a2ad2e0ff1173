"""KV between replicas, and workers that decode on another host."""
