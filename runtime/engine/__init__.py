"""The native engine: what turns token ids and weights into the next token."""
