"""The session: what all cursors of one database share.

Settings, variables, the model functions, the statements in flight and what they used. Two sessions in one process
know nothing of each other.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import duckdb
import pyarrow as pa

from runtime.errors import SqlextError
from runtime.gateway import Budget, Budgets, Limits, ResultStore, Statement, default_path
from runtime.gateway.store import Measured
from runtime.secrets import redact
from runtime.training.folder import JobFolder
from sqlext import options
from udfs.context import StatementTable
from udfs.prompts import PromptOrders
from udfs.register import FORMS, HELPER_NAMES, FunctionCatalog

MAX_QUERY = 200  # characters of a statement that are kept
HISTORY = 200  # ended statements whose usage is remembered


class Session:
    """State shared by the cursors of one database.

    Args:
        raw: a DuckDB connection to the database; the session keeps a cursor of its own on it.

    Attributes:
        notify: told what is worth saying but is not data; prints to stderr unless replaced.
        on_deploy: told how far a deployment is.
        on_job: told in words how far a job is that is waited for; '' when the waiting is over.
        benchmark: what the latest load test saw of each request.
        own_jobs: jobs that would end with this process, as its own Ray does.
    """

    def __init__(self, raw: duckdb.DuckDBPyConnection) -> None:
        self._admin = raw.cursor()
        self.statements = StatementTable()
        self._orders = PromptOrders(self._recall, self._remember)
        self.functions = FunctionCatalog(self._admin, self.statements, self._orders)
        self.settings: dict[str, Any] = options.defaults("single")
        self.variables: dict[str, str] = {}
        self.dialect = "duckdb"
        self.notify: Callable[[str], None] = _to_stderr
        self.on_deploy: Callable[[Any], None] = _ignore
        self.on_job: Callable[[str], None] = _ignore
        self.benchmark: pa.Table | None = None
        self.own_jobs: list[JobFolder] = []
        self.history: deque[Statement] = deque(maxlen=HISTORY)
        self.duckdb_settings = DuckdbSettings(self._ask)
        self._store: ResultStore | None = None
        self._budget = Budget(Limits(prefix="session."))
        self._clocks: dict[int, list[threading.Timer]] = {}
        self._lock = threading.Lock()
        self._reader = raw.cursor()  # a cursor serves one thread at a time
        self._reading = threading.Lock()

    def change_settings(self, settings: dict[str, Any]) -> None:
        """Take these settings for what follows, also for queries that DuckDB runs without us, as of a relation."""
        self.settings = settings
        self._bound_store()
        self._budget.limits = _limits(settings, "session.")
        unknown = self.statements.default
        unknown.on_error, unknown.cache = settings["on_error"], settings["cache"]
        unknown.budgets = Budgets([self._budget])

    def new_statement(self, query: str = "") -> Statement:
        """A statement with the session's present settings, its clock running."""
        settings = self.settings
        if not self.statements.running():
            self._orders.new_statement()
        budgets = [Budget(_limits(settings)), self._budget]
        statement = Statement(
            self.statements.new_id(),
            on_error=settings["on_error"],
            cache=settings["cache"],
            budgets=Budgets(budgets),
            query=redact(" ".join(query.split()))[:MAX_QUERY],
        )
        self._start_clocks(statement, budgets)
        return statement

    def ended(self, statement: Statement) -> None:
        """Remember what a statement used, and drop what was kept for it."""
        self.statements.discard(statement)
        for clock in self._clocks.pop(statement.id, ()):
            clock.cancel()
        for gateway in self.functions.gateways().values():
            gateway.forget(statement)
        if statement.usage:
            # The time after the last answer is the user's own.
            self._budget.seconds += max(usage.ended or statement.started for usage in statement.usage.values()) - (
                statement.started
            )
            self._add_measured(statement)
            with self._lock:
                self.history.append(statement)

    def _add_measured(self, statement: Statement) -> None:
        """Remember what calls took, for the estimates of EXPLAIN LLM."""
        gateways = self.functions.gateways()
        for model, usage in statement.usage.items():
            fingerprint = gateways[model].pool.spec.fingerprint if model in gateways else ""
            if self._store and fingerprint and usage.calls:
                measured = Measured(usage.calls, usage.prompt_tokens, usage.completion_tokens, usage.seconds)
                with suppress(SqlextError):  # the statement's answers are there; an estimate is not worth an error
                    self._store.add_measured(fingerprint, measured)

    @property
    def store(self) -> ResultStore | None:
        """Where answers are kept beyond the session; opened when it is first needed. None where it cannot be opened
        and cache=off, which needs none.

        Raises:
            SqlextError: it cannot be opened.
        """
        try:
            return self._opened_store()
        except SqlextError:
            if self.settings["cache"] != "off":
                raise
            return None

    def stored(self) -> ResultStore | None:
        """What is stored already, also with cache=off; None when there is nothing. No file is made.

        Raises:
            SqlextError: it cannot be opened.
        """
        return self._opened_store() if default_path().exists() else self._store

    def _opened_store(self) -> ResultStore:
        with self._lock:
            if self._store is None:
                self._store = ResultStore(default_path())
                self._bound_store()
            return self._store

    def _bound_store(self) -> None:
        """Give the store the session's present bounds."""
        if self._store:
            days = self.settings["cache_max_days"]
            self._store.max_bytes = self.settings["cache_max_mb"] * 2**20
            self._store.max_age_s = None if days is None else days * 86_400.0

    def _recall(self, name: str) -> str | None:
        return self.store.recall(name) if self.store else None

    def _remember(self, name: str, text: str) -> None:
        if self.store:
            self.store.remember(name, text)

    def forget_answers(self, model: str | None = None) -> None:
        """Drop what `model`, or every model, has answered from memory; the store is left as it is."""
        if model is None:
            self._orders.forget()
        for name, gateway in self.functions.gateways().items():
            if model in (None, name):
                gateway.forget_answers()

    def _start_clocks(self, statement: Statement, budgets: list[Budget]) -> None:
        """End the statement when one of the budgets has no time left."""
        for budget in budgets:
            if (left := budget.seconds_left) is not None:
                over = budget.exceeded("max_seconds")
                clock = threading.Timer(left, functools.partial(statement.fail, over))
                clock.daemon = True
                self._clocks.setdefault(statement.id, []).append(clock)
                clock.start()

    def known_statements(self) -> list[Statement]:
        """All statements whose figures are remembered, oldest first, those in flight among them."""
        with self._lock:
            return [*self.history, *self.statements.running(), self.statements.default]

    def is_taken(self, name: str) -> bool:
        """Whether `name` is a function or a reserved word of DuckDB's, one of our helpers, or a form of a model's."""
        models = self.functions.gateways()
        near = {name.removesuffix(form) for form in FORMS} | {name + form for form in FORMS}
        if name in HELPER_NAMES or near & models.keys():
            return name not in models
        query = """
            SELECT 1 FROM duckdb_functions() WHERE lower(function_name) = $1 AND NOT $2
            UNION ALL SELECT 1 FROM duckdb_keywords() WHERE keyword_name = $1 AND keyword_category <> 'unreserved'
        """
        return bool(self._ask(query, [name, self.functions.owns(name)]))

    def _ask(self, query: str, parameters: list[Any]) -> list[Any]:
        with self._reading:
            return self._reader.execute(query, parameters).fetchall()

    def close(self) -> None:
        """Drop the functions and the handles to their workers. The models stay deployed on a cluster of others."""
        for statement in (*self.statements.running(), self.statements.default):
            statement.cancel()
        gateways = self.functions.gateways()
        with suppress(duckdb.Error):  # the database may have been closed before us
            self.functions.close()
        for gateway in gateways.values():
            gateway.close()
        if self._store:
            self._store.close()
        self._reader.close()
        self._admin.close()


class DuckdbSettings:
    """Names that `SET name=…` gives to DuckDB, settings of extensions that are not loaded among them."""

    def __init__(self, ask: Callable[[str, list[Any]], list[Any]]) -> None:
        self._ask = ask
        self._known: dict[str, bool] = {}

    def __contains__(self, name: object) -> bool:
        name = str(name).lower()
        if name not in self._known:
            try:
                self._ask("SELECT current_setting(?)", [name])
                self._known[name] = True
            except duckdb.Error as error:
                self._known[name] = "unrecognized configuration parameter" not in str(error)
        return self._known[name]


def _limits(settings: dict[str, Any], prefix: str = "") -> Limits:
    names = ("max_rows", "max_tokens_total", "max_seconds")
    return Limits(**{name: settings.get(f"{prefix}{name}") for name in names}, prefix=prefix)


def _ignore(event: Any) -> None:
    pass


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
