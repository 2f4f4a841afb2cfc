"""The API's document, and hostile requests that schemathesis makes of it: no 500, no hang, and only answers that it promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks

from schemas.settings import Settings
from tests.api_rig import DEADLINE_S, Api, put, serving
from tests.tape import incident
from tests.test_api import configured
from tokentape.api.app import ROUTES
from tokentape.api.openapi import document

schema = schemathesis.openapi.from_dict(document(ROUTES))
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
FEW = settings(
    max_examples=3,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@schemathesis.serializer("application/x-protobuf")
def as_bytes(context: Any, value: Any) -> bytes:
    """Hostile spans are any bytes."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API for all requests, an admin's key, and a tape."""
    settings_ = configured(Settings(data=tmp_path_factory.mktemp("fuzz")))
    put(settings_, [stored.event for stored in incident().events])
    with serving(settings_) as api:
        yield api.by("admin", owner="root")


@schema.parametrize()
@FEW
def test_hostile_requests(case: Any, api: Api) -> None:
    """Each operation of the document, with what fits it and what does not."""
    if isinstance(case.query, dict):
        case.query.pop("follow", None)  # a stream has no end to wait for
    case.validate_response(case.call(base_url=api.url, headers=api.headers, timeout=DEADLINE_S), checks=CHECKS)
