"""What gateway workers share, as a small log of its own that each of them follows: one interface, two backends."""

from __future__ import annotations

from schemas.settings import Settings
from store.control.base import ControlLog, ControlRecord, Value, standing
from store.control.view import ControlView

__all__ = ["ControlLog", "ControlRecord", "ControlView", "Value", "open_control", "standing"]


def open_control(settings: Settings) -> ControlLog:
    """Open the control log beside the event log: `control/control.sqlite` under the data directory, or the
    compacted topic `<log.topic>.control`; made first where there is none.

    Raises:
        LogUnavailable: it does not answer.
        SettingsError: the topic is unfit.
    """
    if settings.log.kind == "embedded":
        from store.control.embedded import EmbeddedControl

        return EmbeddedControl(settings.data / "control" / "control.sqlite", timeout_s=settings.log.timeout_s)
    from store.control.kafka import KafkaControl

    return KafkaControl(settings.log)
