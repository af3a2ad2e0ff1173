"""KV blocks: whose they are, what memory they have, and where they go when they leave it."""
