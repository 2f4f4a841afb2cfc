"""SQL over everything recorded, in the sandbox; a caller bound to a tenant sees its rows and the documented views."""

from __future__ import annotations

import io
from typing import Literal

import orjson
from pydantic import Field
from starlette.responses import Response

from ingest.gateway import bodies as b
from ingest.gateway.keys import Role
from store import views
from tokentape.api.routing import Call, Reply, Route, Taken
from tokentape.output import write_table

ANALYSTS: frozenset[Role] = frozenset({"analyst"})
ARROW = "application/vnd.apache.arrow.stream"
CSV = "text/csv"
MEDIA: dict[str, str] = {"json": "application/json", "csv": CSV, "arrow": ARROW}


class Statement(Taken):
    """One statement."""

    query: str = Field(min_length=1, max_length=100_000)
    format: Literal["json", "csv", "arrow"] | None = Field(default=None, description="By default what `Accept` asks for, else JSON.")
    tenant: str | None = Field(default=None, max_length=100, description="Answer as this tenant may.")


def sql(call: Call) -> Reply | Response:
    """The rows, with how complete they are: in the document, or in headers beside CSV and Arrow."""
    asked: Statement = call.body
    tenant = call.principal.bound(asked.tenant)
    call.desks.freshen()
    answer = call.desks.installation.sql.query(asked.query, tenant=tenant)
    table = answer.table
    call.rows = table.num_rows
    complete = call.desks.completeness()
    accepted = call.headers.get("accept", "")
    form: str = asked.format or next((name for name, media in MEDIA.items() if name != "json" and media in accepted), "json")
    if form == "json":
        columns = [{"name": field.name, "type": str(field.type)} for field in table.schema]
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        return Reply({"columns": columns, "rows": rows, "row_count": table.num_rows, "completeness": complete})
    headers = {"x-tokentape-completeness": orjson.dumps(complete).decode(), "x-tokentape-rows": str(table.num_rows)}
    sink = io.BytesIO()
    write_table(table, form, stream=sink)
    return Response(sink.getvalue(), media_type=MEDIA[form], headers=headers)


def list_views(call: Call) -> Reply:
    """The views and their columns."""
    told = [{"name": v.name, "purpose": v.purpose, "columns": [{"name": n, "type": t} for n, t in v.columns]} for v in views.describe()]
    return Reply({"views": told})


ROUTES = (
    Route(
        "POST",
        "/sql",
        "sql",
        "One statement over hot and cold, in a sandbox that can only read.",
        ANALYSTS,
        sql,
        body=Statement,
        answer=b.record("columns rows row_count completeness"),
        content=True,
        media=tuple(MEDIA.values()),
    ),
    Route("GET", "/sql/views", "sql_views", "The views and their columns.", ANALYSTS, list_views, answer=b.record("views")),
)
