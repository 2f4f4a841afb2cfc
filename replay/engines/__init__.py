"""What can be asked to say a recorded session again: vLLM in this process, an engine over HTTP, or the tape itself."""
