"""What NULL for an answer can do to a query: whether a run without answers asks for more than the real one.

It stands alone because it is a matter of logic only: it looks at trees, and runs nothing.
"""

from __future__ import annotations

import json
from typing import Any

from sqlext.query_sources import Sources, builtin
from sqlext.query_tree import (
    CONDITIONAL,
    CONDITIONAL_FUNCTIONS,
    LIMITS,
    Node,
    function_of,
    given_names,
    has,
    lowered,
    nodes,
    of,
    words,
)

# What gives NULL for NULL, or follows three-valued logic: with NULL for an answer, fewer rows pass, never others.
_STRICT_TYPES = words(
    "OPERATOR_CAST OPERATOR_NOT STRUCT_EXTRACT ARRAY_EXTRACT CONJUNCTION_AND CONJUNCTION_OR COMPARE_BETWEEN "
    "COMPARE_IN COMPARE_EQUAL COMPARE_NOTEQUAL COMPARE_LESSTHAN COMPARE_GREATERTHAN COMPARE_LESSTHANOREQUALTO "
    "COMPARE_GREATERTHANOREQUALTO COLUMN_REF"
)
_STRICT_FUNCTIONS = words(
    "|| ~~ !~~ ~~* !~~* ->> + - * / // % prefix suffix contains starts_with ends_with lower upper trim ltrim rtrim "
    "substring substr left right replace length strlen regexp_matches regexp_full_match regexp_extract "
    "regexp_replace split_part abs round floor ceil json_extract json_extract_string struct_extract array_extract "
    "array_cosine_similarity array_cosine_distance array_distance array_inner_product"
)


def harmless(sources: Sources, calls: int) -> bool:
    """Whether a run with NULL for every answer that is not known asks for nothing that the real run does not."""
    flow = _Flow(sources)
    if flow.limited and (flow.guides or flow.merges):
        return False  # looking for rows that NULL never gives, it would read everything
    if calls == 1:
        return True
    if flow.chooses or (flow.limited and flow.orders):
        return False
    if not (flow.guides or flow.nests or flow.groups):
        return True  # side by side: no call sees what another one answered
    return not (flow.limited or flow.groups or flow.blends or (flow.guides and flow.joins))


def decides_calls(sources: Sources, calls: int) -> bool:
    """Whether an answer may decide which other calls are made, or with which arguments."""
    flow = _Flow(sources)
    return calls > 1 and (flow.guides or flow.nests or flow.chooses or flow.groups)


def ends_early(sources: Sources) -> bool:
    """Whether answers decide which rows go on, and with enough of them no more are read."""
    flow = _Flow(sources)
    return flow.limited and (flow.guides or flow.merges)


def holds_answer(sources: Sources, tree: Any) -> bool:
    """Whether the value of an expression of the query may depend on an answer."""
    return _Flow(sources).carries(tree)


class _Flow:
    """Where answers go. Names are not told apart by scope: a name that may hold an answer somewhere, does."""

    def __init__(self, sources: Sources) -> None:
        self.trees = sources.all
        self.is_call = sources.is_call
        ctes = (it["key"] for node in nodes(self.trees) for it in (node.get("cte_map") or {}).get("map", ()))
        self._derived = lowered(ctes) | sources.expanded  # tables that are queries themselves
        names, self._rows = given_names(self.trees)  # a table's name alone stands for its row
        self._names = sources.parameters | sources.columns | names
        items = [item for node in of(self.trees, "SELECT_NODE") for item in node["select_list"]]
        named = [(lowered([it.get("alias") or (it.get("column_names") or [""])[-1]]), it) for it in items]
        while more := {name for names, item in named if self.carries(item) for name in names} - self._names:
            self._names |= more

    @property
    def limited(self) -> bool:
        """Whether reading may stop early above a call."""
        exists = any(it.get("subquery_type") == "EXISTS" for it in of(self.trees, "SUBQUERY"))
        limited = (node for node in nodes(self.trees) if has(node.get("modifiers"), *LIMITS))
        return exists or any(self._asks(node) for node in limited)

    def _asks(self, query: Node) -> bool:
        """Whether there is a call in a query, or may be one in what it reads."""
        tables = lowered(table["table_name"] for table in of(query, "BASE_TABLE"))
        return bool(tables & self._derived) or any(self.is_call(node) for node in nodes(query))

    @property
    def guides(self) -> bool:
        """Whether answers decide which rows go on."""
        guards: list[Any] = [
            node.get(key) for node in nodes(self.trees) for key in ("where_clause", "having", "qualify", "condition")
        ]
        guards += [node["filter"] for node in of(self.trees, "FUNCTION") if node.get("filter")]
        guards += [node["select_list"] for node in of(self.trees, "SELECT_NODE") if has(node, "DISTINCT_MODIFIER")]
        shared = lowered(name for join in of(self.trees, "JOIN") for name in join.get("using_columns") or ())
        return self.carries(guards) or bool(shared & self._names)

    @property
    def groups(self) -> bool:
        """Whether rows are put together by answers, or it cannot be told."""
        return any(
            node.get("aggregate_handling") == "FORCE_AGGREGATES"
            or self.carries(node["group_expressions"])
            or has(node["group_expressions"], "VALUE_CONSTANT")
            for node in of(self.trees, "SELECT_NODE")
        )

    @property
    def orders(self) -> bool:
        """Whether rows are put in order by answers, or it cannot be told."""
        keys = [node["orders"] for node in of(self.trees, "ORDER_MODIFIER")]
        return self.carries(keys) or has(keys, "VALUE_CONSTANT")

    @property
    def nests(self) -> bool:
        """Whether a call has an answer in its arguments."""
        return any(self.carries(node["arguments"]) for node in nodes(self.trees) if self.is_call(node))

    @property
    def chooses(self) -> bool:
        """Whether an answer decides in an expression whether another call is made."""
        return any(self._chooses(node) for node in nodes(self.trees))

    @property
    def blends(self) -> bool:
        """Whether an expression may make something of NULL, or puts rows together, or outlives a missing row."""
        for node in nodes(self.trees):
            name, kind = function_of(node), node.get("type")
            strict = kind in _STRICT_TYPES or name in _STRICT_FUNCTIONS or self.is_call(node)
            if "class" in node and node["class"] != "STAR" and not strict and self.carries(node):
                return True
            if name in builtin().aggregates or node.get("class") in ("WINDOW", "SUBQUERY"):
                return True
            if kind == "JOIN" and (node["join_type"] != "INNER" or node["ref_type"] not in ("REGULAR", "CROSS")):
                return True
            if kind == "DISTINCT_MODIFIER" or (kind == "SET_OPERATION_NODE" and not self._all(node)):
                return True
        return False

    @property
    def joins(self) -> bool:
        """Whether tables are joined."""
        return has(self.trees, "JOIN")

    @property
    def merges(self) -> bool:
        """Whether equal rows become one in a set operation."""
        return not all(self._all(node) for node in of(self.trees, "SET_OPERATION_NODE"))

    def carries(self, tree: Any) -> bool:
        """Whether the value of an expression may depend on an answer."""
        return any(self._carrier(node) for node in nodes(tree))

    def _carrier(self, node: Node) -> bool:
        if node.get("class") == "COLUMN_REF":
            names = lowered(node["column_names"])
            whole_row = len(names) == 1 and bool(names & self._rows)
            return whole_row or bool(names & self._names) or any("(" in it for it in names)  # "chat(s)", no alias
        return node.get("class") in ("POSITIONAL_REFERENCE", "STAR") or self.is_call(node)

    def _chooses(self, node: Node) -> bool:
        if node.get("type") == "CASE_EXPR" and not self.carries([it["when_expr"] for it in node["case_checks"]]):
            return False
        if node.get("type") not in CONDITIONAL and function_of(node) not in CONDITIONAL_FUNCTIONS:
            return False
        inside = [it for it in nodes(node) if self._carrier(it)]
        return any(self.is_call(it) for it in inside) and len({json.dumps(it) for it in inside}) > 1

    @staticmethod
    def _all(node: Node) -> bool:
        return node["setop_type"] == "UNION" and bool(node["setop_all"])
