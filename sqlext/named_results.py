"""`SELECT … AS t;`: Byzer's way to give a result a name.

Where DuckDB cannot mean anything else by it, the result is kept as the temporary table `t`. Where it can
(`… FROM x AS t` is a table's alias), DuckDB's meaning stands and the query is only remembered: if a later statement
asks for a table of that name and there is none, it is made then. So nothing of the user's is ever hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import duckdb

from sqlext.parser import trailing_name
from sqlext.sources import stage

T = TypeVar("T")


class NamedResults:
    """The names that queries of one cursor have given to their results."""

    def __init__(self) -> None:
        self._remembered: dict[str, str] = {}

    def take(self, text: str, parses: Callable[[str], bool]) -> tuple[str, str | None]:
        """What to run for `text`, and the name that its staged result is then to have (None: it has none).

        Args:
            parses: whether DuckDB can read a text.
        """
        tail = trailing_name(text)
        if tail is None:
            return text, None
        query, name = tail
        if parses(text):
            self._remembered[name.lower()] = query
            return text, None
        if not parses(query):
            return text, None
        self._remembered.pop(name.lower(), None)
        return stage(query), name

    def run(self, work: Callable[[], T], make: Callable[[str, str], object]) -> T:
        """Do `work`; a table it misses that was remembered is made by `make(name, query)`, and the work done again.

        DuckDB finds a missing table before it does anything, so nothing is done twice.
        """
        while True:
            try:
                return work()
            except duckdb.CatalogException as error:
                name = _missing_table(str(error))
                query = self._remembered.pop(name, None)
                if query is None:
                    raise
                self.run(partial(make, name, query), make)


def _missing_table(message: str) -> str:
    match = re.match(r"Catalog Error: Table with name (\S+) does not exist", message)
    return match[1].strip('"').lower() if match else ""
