"""What every endpoint of the gateway works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingest.gateway.kept import Kept
from ingest.gateway.keys import Keyring
from ingest.gateway.placement import Placement
from ingest.gateway.quotas import Quotas
from ingest.gateway.routes import Routes
from ingest.gateway.sessions import Sessions
from ingest.gateway.stops import Stops
from ingest.gateway.tape import Recording
from ingest.redaction import Redactor
from schemas.settings import Settings
from store.control import ControlLog, ControlView

if TYPE_CHECKING:
    from ingest.gateway.tracing import Tracing


@dataclass(frozen=True)
class Parts:
    """The parts of one gateway process. `shared` is its copy of the control log, which is asked without waiting."""

    settings: Settings
    recorder: Recording
    routes: Routes
    sessions: Sessions
    redactor: Redactor
    control: ControlLog
    shared: ControlView
    stops: Stops
    keyring: Keyring
    quotas: Quotas
    placement: Placement
    kept: Kept
    tracing: Tracing | None = None
