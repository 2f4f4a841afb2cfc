"""OpenTelemetry in: spans of calls to models become sessions, so that a service that is already instrumented needs no gateway."""
