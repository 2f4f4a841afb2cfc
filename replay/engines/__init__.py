"""What can be asked to say a recorded session again: an engine over HTTP, or the tape itself."""
