"""A recorder before the recorder that sends large bodies and attachments of requests to the blob store."""

from __future__ import annotations

from ingest.attachments import Attachments, Deferred
from ingest.gateway.tape import Recording
from ingest.pipeline import is_sampled
from schemas.events import Payload, RequestSubmitted
from schemas.settings import RecorderSettings
from schemas.sink import SessionContext


class Offload:
    """Lets everything pass; of requests that are recorded the large parts go their own way."""

    def __init__(self, recorder: Recording, attachments: Attachments, settings: RecorderSettings) -> None:
        self.tokens = recorder.tokens  # by far the most frequent: no step in between
        self.run = recorder.run
        self.durable = recorder.durable
        self._recorder = recorder
        self._attachments = attachments
        self._rate = settings.sample_rate

    def record(self, session: SessionContext, payload: Payload | Deferred) -> None:
        """Record one event."""
        if payload.__class__ is RequestSubmitted and session.content and is_sampled(session, self._rate):
            assert isinstance(payload, RequestSubmitted)
            payload = self._attachments.defer(session.tenant, payload)
        self._recorder.record(session, payload)
