"""Capture inside vLLM: in the engine core, or in the server's process."""
