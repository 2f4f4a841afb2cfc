"""Capture inside vLLM: in the engine core, in the server's process, or around an engine in one's own process."""
