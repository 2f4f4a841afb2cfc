"""What a statement may say: one statement, and for a caller bound to one tenant only the views, in the parse tree itself.

For callers that may see everything this is courtesy: what holds is the confined process with READ_ONLY files. For a caller bound
to a tenant it is a gate: rows of others stand in the same shards, so nothing but the filtering views may be named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Set
from typing import Any

import duckdb

from schemas.errors import QueryError
from store import views

_TABLE_FUNCTIONS = {"unnest", "range", "generate_series"}
_QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLES = {"BASE_TABLE", "SUBQUERY", "JOIN", "EXPRESSION_LIST", "EMPTY", "TABLE_FUNCTION", "PIVOT", "SHOW_REF"}
_OTHERS = {"ORDER_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "DISTINCT_MODIFIER", "ORDER_DEFAULT", "ASCENDING", "DESCENDING"}
_NODES = _QUERIES | _TABLES | _OTHERS

# What tells about the process, its files or other tenants' rows: settings, catalogs, statistics, plans, logs, raw aggregate states.
_REFUSED = re.compile(
    r"current_(?!date$|time$|timestamp$|localtime$|localtimestamp$).*|pg_(?!typeof$|size_pretty$).*|has_.*_privilege|inet_.*"
    r"|.*_description|duckdb_.*|pragma_.*|read_.*|parquet_.*|sniff_.*|json_(de)?serialize_.*|json_execute_.*|query|query_table|glob|getenv"
    r"|getvariable|stats|nextval|currval|in_search_path|write_log|parse_duckdb_log_message|txid_current|session_user|user|get_block_size"
    r"|sleep_ms|combine|finalize|which_secret|format_type|format_pg_type|map_to_pg_oid|__.*"
)
_CTE_NAME = re.compile(r"(?!_|duckdb_|pg_|sqlite_|pragma_|information_schema|shard_)[A-Za-z][A-Za-z0-9_]*")


def check_statement(connection: duckdb.DuckDBPyConnection, statement: str, *, tenant: str | None, reading: Set[str] | None) -> None:
    """Refuse what is not one statement of the types in `reading` (None: anything goes), or for a tenant not on the list.

    Raises:
        QueryError: with what is valid as its hint; DuckDB's own errors for what does not parse.
    """
    statements = connection.extract_statements(statement)
    # PIVOT without a list of values comes as several statements without text.
    written = [part for part in statements if part.query.strip()]
    if not statements:
        raise QueryError("no statement", hint="for example: SELECT * FROM sessions")
    if reading is not None and (len(written) > 1 or (written and len(written) != len(statements))):
        raise QueryError("more than one statement", hint="send one statement at a time")
    types = {part.type.name for part in statements} if written else {"SELECT"}
    if reading is not None and not types <= reading:
        raise QueryError(f"{'/'.join(sorted(types))} is not allowed", hint="SQL here only reads: SELECT, DESCRIBE, SUMMARIZE, EXPLAIN")
    if tenant is not None:
        check_tree(_tree(connection, statement))


def _tree(connection: duckdb.DuckDBPyConnection, statement: str) -> Any:
    row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement]).fetchone()
    tree: Any = json.loads(row[0]) if row else {"error": True, "error_message": "no tree"}
    if tree["error"]:
        hint = "a caller bound to a tenant may use SELECT, DESCRIBE and SUMMARIZE; PIVOT needs its values listed (ON x IN (…))"
        raise QueryError(str(tree["error_message"]).splitlines()[0], hint=hint)
    if len(tree["statements"]) != 1:
        raise QueryError("more than one statement", hint="send one statement at a time")
    return tree["statements"]


def check_tree(tree: Any) -> None:
    """Refuse a tree (as `json_serialize_sql` gives it) that names anything but the views and its own CTEs.

    Raises:
        QueryError: what it names.
    """
    _walk(tree, frozenset())


def _walk(node: Any, known: frozenset[str]) -> None:
    if isinstance(node, list):
        for item in node:
            _walk(item, known)
    elif isinstance(node, dict):
        known = _with_ctes(node, known)
        _check_node(node, known)
        _walk([value for key, value in node.items() if key != "cte_map"], known)


def _with_ctes(node: dict[str, Any], known: frozenset[str]) -> frozenset[str]:
    """The names known inside a query: each CTE sees those before it, and itself when it is recursive."""
    for entry in (node.get("cte_map") or {}).get("map") or ():
        name = _cte_name(entry["key"])
        inner = entry["value"]["query"]["node"]
        _walk(entry["value"], known | {name} if inner["type"] == "RECURSIVE_CTE_NODE" else known)
        known |= {name}
    return known


def _cte_name(name: str) -> str:
    if not _CTE_NAME.fullmatch(name):
        raise _refused("CTE", name, "name it with letters and digits, and not like a system table")
    return name.lower()


def _check_node(node: dict[str, Any], known: Iterable[str]) -> None:
    kind = node.get("type")
    if node.get("class") in ("FUNCTION", "WINDOW"):
        if _REFUSED.fullmatch(str(node.get("function_name", "")).lower()):
            raise _refused("function", node["function_name"])
    elif not isinstance(kind, str) or "class" in node:
        return
    elif kind == "BASE_TABLE":
        _check_table(node, known)
    elif kind == "TABLE_FUNCTION":
        function = node["function"]
        if function.get("function_name", "").lower() not in _TABLE_FUNCTIONS or function.get("schema") or function.get("catalog"):
            raise _refused("table function", function.get("function_name", "?"), f"valid are {', '.join(sorted(_TABLE_FUNCTIONS))}")
    elif kind == "SHOW_REF" and (node.get("table_name") or not node.get("query")):
        raise _refused("SHOW", node.get("table_name") or "?", "DESCRIBE and SUMMARIZE of a view or query are allowed")
    elif kind not in _NODES and not kind.endswith("_TYPE_INFO"):
        raise _refused("syntax", kind)


def _check_table(node: dict[str, Any], known: Iterable[str]) -> None:
    name = node["table_name"]
    if node.get("schema_name") or node.get("catalog_name") or name.lower() not in (views.NAMES | set(known)):
        full = ".".join(part for part in (node.get("catalog_name"), node.get("schema_name"), name) if part)
        raise _refused("table", full, f"views: {', '.join(sorted(views.NAMES))}")


def _refused(what: str, name: str, hint: str = "") -> QueryError:
    return QueryError(f"{what} {name} is not allowed for a caller bound to a tenant", hint=hint or "ask with a role that sees all tenants")
