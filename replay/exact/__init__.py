"""Exact replay: an engine run of the tape, again: the same traffic between the same calls of the engine, and every bit compared."""
