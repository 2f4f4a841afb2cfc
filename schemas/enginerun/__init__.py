"""A run of an engine as the tape holds it: what came between its calls, what it decided, what it was built of. Pure.

An engine core is a deterministic state machine of its configuration, its requests, and where arrivals and aborts fell
between its calls of `schedule` and `update`. So these calls are what has to be written down.
"""
