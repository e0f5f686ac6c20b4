"""What hangs on the order of rows: whether two runs of a query may pass different values on to model calls.

DuckDB's threads take rows as they come, so lists, first values and sums of floating point numbers differ from run to
run. It stands alone because this has to be known of values only, whatever the answers are; like the flow of answers,
it goes by names and looks at trees only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from sqlext.answer_flow import holds_answer
from sqlext.query_sources import Sources, builtin
from sqlext.query_tree import (
    CONDITIONAL,
    CONDITIONAL_FUNCTIONS,
    LIMITS,
    Node,
    Run,
    function_of,
    given_names,
    has,
    lowered,
    nodes,
    of,
    words,
)

_Calls: TypeAlias = frozenset[tuple[int, str]]
"""Calls, by the SELECT they stand in and what they say."""

_NONE: _Calls = frozenset()
# The same for rows in any order. sum() is not, because the tree does not show whether it adds integers.
_STEADY = words(
    "count count_star count_if countif min max bool_and bool_or bit_and bit_or bit_xor bitstring_agg median quantile "
    "quantile_cont quantile_disc mad regr_count"
)
_STEADY_WINDOWS = words("rank rank_dense dense_rank percent_rank cume_dist")  # peers get the same
_ORDERED = words("string_agg group_concat listagg list array_agg first last any_value arbitrary")
# DuckDB's own macros over unsteady aggregates.
_MACROS = words(
    "geomean geometric_mean json_group_array json_group_object json_group_structure variant_group_array wavg "
    "weighted_avg"
)


def settled(run: Run, sources: Sources) -> bool:
    """Whether every run of a query makes the same calls, in whatever order its rows come."""
    order = _Order(sources)
    if order.takes_first and not run("SELECT current_setting('preserve_insertion_order')::BOOLEAN")[0][0]:
        return False
    return not (order.feeds or order.guards)


class _Order:
    """Where unsteady values go. As in the flow of answers, a name that may hold one somewhere, does.

    An unsteady value comes with the calls that are made before it is known: it decides nothing about these.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._is_call = sources.is_call
        self._trees = sources.all
        self._sites: dict[int, tuple[int, str]] = {}
        self._find_calls(sources.all, 0)
        self._calls = self._inside(sources.trees)
        self._unsteady = set(builtin().aggregates - _STEADY | _MACROS)
        while more := self._unsteady_of(sources.macros) - self._unsteady:
            self._unsteady |= more
        self._names: dict[str, _Calls] = {}
        self._vague: set[str] = set()  # names of which only the query as a whole tells what they may hold
        self._rows: set[str] = set()  # a table's name alone stands for its row
        self._any = any(self._arises(node) or _picks(node) for node in nodes(self._trees))
        self._all = False  # any name may hold an unsteady value
        if self._any:
            self._name_values(sources)

    @property
    def takes_first(self) -> bool:
        """Whether there is a LIMIT without ORDER BY."""
        return any(True for node in self._limited() if not has(node["modifiers"], "ORDER_MODIFIER"))

    @property
    def feeds(self) -> bool:
        """Whether a call may get an unsteady value."""
        calls = (node for node in nodes(self._trees) if self._is_call(node))
        return any(self._values(node["arguments"]) for node in calls)

    @property
    def guards(self) -> bool:
        """Whether an unsteady value may decide for which rows a call is made."""
        return any(self._calls - before for before in self._guards())

    def _guards(self) -> Iterator[_Calls]:
        for node in nodes(self._trees):
            kind = node.get("type")
            for key in ("where_clause", "having", "qualify", "condition", "filter", "filter_expr"):
                yield from self._values(node.get(key))
            if kind == "SELECT_NODE":
                yield from self._values(_group_keys(node))
            if kind == "JOIN" and node["ref_type"] in ("ASOF", "POSITIONAL"):
                yield _NONE  # of rows that fit as well, the first
            if kind == "JOIN":
                yield from (self._names[name] for name in lowered(node["using_columns"]) if name in self._names)
                if node["ref_type"] == "NATURAL" and self._any:
                    yield _NONE
            chooses = kind in CONDITIONAL | {"CONJUNCTION_AND"} or function_of(node) in CONDITIONAL_FUNCTIONS
            if chooses and self._inside(node):
                yield from self._values(node)
        for node in self._limited():
            yield from self._limit_guards(node)

    def _limit_guards(self, query: Node) -> Iterator[_Calls]:
        items = query.get("select_list", [])
        orders = [it["expression"] for order in of(query["modifiers"], "ORDER_MODIFIER") for it in order["orders"]]
        yield from self._values([_meant(key, items) for key in orders])
        yield from self._values([it for it in query["modifiers"] if it["type"] in LIMITS])
        if has(orders, "STAR"):
            yield from self._values(items)
        gathered = [self._below(node) for node in of(self._trees, "SELECT_NODE") if _gathers(node)]
        if not orders:
            yield from gathered  # groups come as threads finish them
        elif not holds_answer(self._sources, orders):  # of rows that are equal in order, the first
            yield _NONE.union(*gathered)

    def _below(self, select: Node) -> _Calls:
        """The calls that are made before a SELECT's rows are put together."""
        aggregates = (node for node in nodes(select["select_list"]) if function_of(node) in builtin().aggregates)
        distinct = has(select["modifiers"], "DISTINCT_MODIFIER")
        parts = [select["from_table"], select["where_clause"], _group_keys(select), *aggregates]
        parts += select["select_list"] if distinct else []
        tables = lowered(table["table_name"] for table in of(parts, "BASE_TABLE"))
        ctes = [it for node in nodes(self._trees) for it in (node.get("cte_map") or {}).get("map", ())]
        return self._inside(parts) | self._inside([it["value"] for it in ctes if it["key"].lower() in tables])

    def _limited(self) -> Iterator[Node]:
        """Queries with a LIMIT; an aggregate's own ORDER BY is none."""
        return (
            node for node in nodes(self._trees) if any(it["type"] in LIMITS for it in node.get("modifiers") or ())
        )

    def _unsteady_of(self, macros: dict[str, list[Node]]) -> set[str]:
        return {name for name, trees in macros.items() if any(map(self._arises, nodes(trees)))}

    def _find_calls(self, tree: Any, select: int) -> None:
        if isinstance(tree, dict):
            select = id(tree) if tree.get("type") == "SELECT_NODE" else select
            if self._is_call(tree):
                self._sites[id(tree)] = (select, json.dumps({**tree, "alias": ""}))
        for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            self._find_calls(value, select)

    def _inside(self, tree: Any) -> _Calls:
        return frozenset(self._sites[id(node)] for node in nodes(tree) if id(node) in self._sites)

    def _name_values(self, sources: Sources) -> None:
        names, self._rows = given_names(self._trees)
        self._vague = sources.columns | names
        while self._name_items():
            pass
        unnamed = [*of(self._trees, "TABLE_FUNCTION", "EXPRESSION_LIST")]
        # A set operation's columns have the names of its first query only, an UNPIVOT's those that it says.
        self._all |= bool(self._values(unnamed)) or has(self._trees, "SET_OPERATION_NODE", "PIVOT")

    def _name_items(self) -> bool:
        """Look once more at what select items hold; whether anything new came of it."""
        known = dict(self._names)
        for select in of(self._trees, "SELECT_NODE"):
            for item in select["select_list"]:
                values = [*self._values(item), *([_NONE] if _picks(select) else [])]
                self._all |= bool(values) and (self._spreads(item) or (_picks(select) and has(item, "STAR")))
                for name in lowered([item.get("alias") or (item.get("column_names") or [""])[-1]]) if values else ():
                    self._names[name] = self._names.get(name, values[0]).intersection(*values)
        return known != self._names

    def _spreads(self, item: Node) -> bool:
        """Whether an item gives columns whose names the tree does not show."""
        for star in of(item, "STAR"):
            if star["columns"] or star["replace_list"] or star["rename_list"] or star["expr"]:
                return True
            if star["relation_name"].lower() in self._names:  # a struct's fields
                return True
        return any(function_of(node) == "unnest" for node in nodes(item))

    def _values(self, tree: Any) -> list[_Calls]:
        """The unsteady values that an expression may hold: the calls made before each of them."""
        return [before for node in nodes(tree) if (before := self._value(node)) is not None]

    def _value(self, node: Node) -> _Calls | None:
        if self._arises(node):
            return self._inside(node)
        if node.get("class") == "COLUMN_REF":
            names = lowered(node["column_names"])
            row = len(names) == 1 and names & self._rows
            if self._all or row or names & self._vague or (self._any and any("(" in it for it in names)):
                return _NONE
            found = [self._names[name] for name in names if name in self._names]
            return found[0].intersection(*found) if found else None
        return _NONE if self._any and node.get("class") in ("POSITIONAL_REFERENCE", "STAR") else None

    def _arises(self, node: Node) -> bool:
        """Whether a node's value differs with the order of the rows."""
        name = function_of(node)
        if node.get("class") == "WINDOW":
            by_rows = "ROWS" in node["start"] + node["end"]
            return name not in _STEADY | _STEADY_WINDOWS or (by_rows and name not in _STEADY_WINDOWS)
        if name in _ORDERED and node["order_bys"]["orders"]:
            return False
        return name in self._unsteady


def _picks(node: Node) -> bool:
    """Whether a SELECT keeps any row out of several: DISTINCT ON without an order."""
    modifiers = node.get("modifiers") or []
    chosen = any(it.get("distinct_on_targets") for it in modifiers)
    return chosen and not any(it["type"] == "ORDER_MODIFIER" for it in modifiers)


def _gathers(select: Node) -> bool:
    """Whether a SELECT reads all of its rows before it gives the first."""
    called = {function_of(node) for node in nodes(select["select_list"])}
    distinct = has(select["modifiers"], "DISTINCT_MODIFIER")
    return distinct or bool(_group_keys(select)) or bool(called & builtin().aggregates)


def _group_keys(select: Node) -> list[Any]:
    items = select["select_list"]
    if select["aggregate_handling"] == "FORCE_AGGREGATES":
        return [it for it in items if not any(function_of(node) in builtin().aggregates for node in nodes(it))]
    return [_meant(key, items) for key in select["group_expressions"]]


def _meant(key: Any, items: list[Any]) -> Any:
    """The select item that a number or an alias stands for in GROUP BY and ORDER BY."""
    text = key.get("literal", {}).get("text", "") if key["type"] == "VALUE_CONSTANT" else ""
    if str(text).isdigit() and 0 < int(text) <= len(items):
        return items[int(text) - 1]
    names = lowered(key["column_names"]) if key["type"] == "COLUMN_REF" else set()
    for item in items:
        # In chat(a) AS a, the alias is that of a column, which comes first.
        inner = {name for it in of(item, "COLUMN_REF") for name in lowered(it["column_names"])}
        if names == lowered([item.get("alias")]) and not names & inner:
            return [key, item]
    return key
