"""SQL that runs the whole life of a language model on DuckDB.

import sqlext

con = sqlext.connect("my.duckdb")
con.execute('''RUN command AS LLM.`` WHERE action="infer" AND localModelDir="/models/mine" AND udfName="chat";''')
con.sql("SELECT chat(question) FROM questions").df()
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import runtime
from runtime.errors import (
    Cancelled,
    DeployError,
    Fatal,
    Retryable,
    RowError,
    SqlextError,
    SqlSyntaxError,
    UserError,
)

if TYPE_CHECKING:
    from sqlext.connection import Connection, attach, connect

__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "Connection",
    "DeployError",
    "Fatal",
    "Retryable",
    "RowError",
    "SqlSyntaxError",
    "SqlextError",
    "UserError",
    "attach",
    "connect",
]


if os.path.dirname(os.path.dirname(str(runtime.__file__))) != os.path.dirname(os.path.dirname(__file__)):
    raise ImportError(
        f"sqlext needs its own package `runtime`, but Python found another one: {runtime.__file__}. "
        "Remove or rename that one, or run from another folder."
    )


def __getattr__(name: str) -> Any:
    if name in ("Connection", "attach", "connect"):  # DuckDB and Arrow are loaded when first needed
        from sqlext import connection

        return getattr(connection, name)
    raise AttributeError(f"module 'sqlext' has no attribute {name!r}")
