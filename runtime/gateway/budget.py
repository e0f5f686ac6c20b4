"""Budgets: bounds on what a statement or a session may send to models.

Tokens are set aside before a call is sent, at the most it can cost, and settled by what it did cost: calls that run
at the same time can never overshoot together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import Fatal, UserError
from runtime.spec import CallOptions, EngineInfo, Prompt, Task

TOKENS_PER_TURN = 16  # at most, that a chat template writes around one more message


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds; None is none. `prefix` stands before the settings' names in messages: '' or 'session.'."""

    max_rows: int | None = None
    max_tokens_total: int | None = None
    max_seconds: float | None = None
    prefix: str = ""

    def __bool__(self) -> bool:
        return (self.max_rows, self.max_tokens_total, self.max_seconds) != (None, None, None)


class Budget:
    """What is spent and set aside under some limits. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rows = 0
        self.tokens = 0  # spent, by what the engine counted
        self.seconds = 0.0  # spent by statements that have ended
        self._reserved = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def reserve(self, tokens: int) -> bool:
        """Set aside one row and at most `tokens`; False: not before what is under way has been settled.

        Raises:
            Fatal: budget: nothing is under way, so there will never be room for it.
        """
        with self._lock:
            forbidden = self._forbidden_by(tokens)
            if forbidden is None:
                self.rows += 1
                self._reserved += tokens
                self._under_way += 1
            elif not self._under_way:
                raise self.exceeded(forbidden)
            return forbidden is None

    def _forbidden_by(self, tokens: int) -> str | None:
        """The name of the setting that forbids one more row of so many tokens now."""
        limits = self.limits
        if limits.max_rows is not None and self.rows >= limits.max_rows:
            return "max_rows"
        if limits.max_tokens_total is not None and self.tokens + self._reserved + tokens > limits.max_tokens_total:
            return "max_tokens_total"
        return None

    def exceeded_by(self, rows: int, tokens: int) -> str | None:
        """The setting, with its prefix, that so many more rows and tokens would exceed; None when they fit."""
        limits = self.limits
        if limits.max_rows is not None and self.rows + rows > limits.max_rows:
            return f"{limits.prefix}max_rows"
        if limits.max_tokens_total is not None and self.tokens + tokens > limits.max_tokens_total:
            return f"{limits.prefix}max_tokens_total"
        return None

    def settle(self, reserved: int, used: int, *, sent: bool = True) -> None:
        """What was set aside cost this much; `sent=False`: it never was sent, and is no row either."""
        with self._lock:
            self._under_way -= 1
            self._reserved -= reserved
            self.tokens += used
            self.rows -= not sent

    @property
    def seconds_left(self) -> float | None:
        """Seconds that a statement which begins now may take; None: any number."""
        most = self.limits.max_seconds
        return None if most is None else max(0.0, most - self.seconds)

    def exceeded(self, setting: str) -> Fatal:
        """The error that ends a statement at this limit."""
        name = f"{self.limits.prefix}{setting}"
        most = getattr(self.limits, setting)
        spent = {"max_rows": self.rows, "max_tokens_total": self.tokens}.get(setting)
        used = f", and {spent} {'rows' if setting == 'max_rows' else 'tokens'} are used" if spent is not None else ""
        return Fatal(
            f"The budget {name}={most} does not allow another call{used}.",
            code="budget",
            hint=f'What was answered is kept. Raise it with !llm setup "{name}=…" and run the statement again: '
            "it asks only for the rest.",
        )


class Budgets:
    """The budgets of one statement: its own and its session's."""

    def __init__(self, budgets: Sequence[Budget] = ()) -> None:
        self._budgets = [budget for budget in budgets if budget.limits]
        self.counts_tokens = any(budget.limits.max_tokens_total is not None for budget in self._budgets)

    def __bool__(self) -> bool:
        return bool(self._budgets)

    def reserve(self, tokens: int) -> bool:
        """As `Budget.reserve`, in all budgets or in none."""
        reserved: list[Budget] = []
        try:
            for budget in self._budgets:
                if not budget.reserve(tokens):
                    break
                reserved.append(budget)
        finally:
            if len(reserved) < len(self._budgets):
                for budget in reserved:
                    budget.settle(tokens, 0, sent=False)
        return len(reserved) == len(self._budgets)

    def exceeded_by(self, rows: int, tokens: int) -> str | None:
        """As `Budget.exceeded_by`, of the first budget that would be."""
        return next((found for budget in self._budgets if (found := budget.exceeded_by(rows, tokens))), None)

    def settle(self, reserved: int, used: int, *, sent: bool = True) -> None:
        """As `Budget.settle`, in all budgets."""
        for budget in self._budgets:
            budget.settle(reserved, used, sent=sent)


def most_tokens(prompt: Prompt, options: CallOptions, info: EngineInfo) -> int:
    """The most tokens that a call can cost: no token of a text is shorter than one byte of it.

    What a model makes of an image is bounded by its length alone.

    Raises:
        UserError: budget_needs_max_tokens, budget_needs_length: nothing bounds the call.
    """
    if info.task is Task.TRANSCRIBE or (info.max_model_len is None and _has_media(prompt)):
        raise UserError(
            "max_tokens_total cannot be kept: nothing bounds the tokens of a recording or an image.",
            code="budget_needs_length",
            hint='Bound the rows or the time instead: !llm setup "max_rows=…" "max_seconds=…".',
        )
    turns = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    if options.system:
        turns.append(options.system)
    read = sum(len(turn.encode("utf-8", "surrogatepass")) for turn in turns)
    read += info.overhead_tokens + TOKENS_PER_TURN * (len(turns) - 1)
    if _has_media(prompt):
        read = info.max_model_len or read
    if info.task is not Task.GENERATE:
        return min(read, info.max_model_len or read)
    answer = options.max_tokens or info.max_answer_tokens
    if answer is None:
        raise UserError(
            "max_tokens_total cannot be kept when nothing bounds an answer.",
            code="budget_needs_max_tokens",
            hint='Call with max_tokens := …, or deploy with `generation.max_tokens`="…".',
        )
    return read + answer


def _has_media(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and any(message.media for message in prompt)
