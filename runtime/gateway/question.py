"""A question: prompts that share their options, as one statement asks them, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from runtime.gateway.call import PlainOutcome
from runtime.gateway.statement import CacheMode
from runtime.spec import CallOptions, Prompt


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that share their options.

    `cache` None: as the statement says. `strict`: where the statement's on_error is «fail», a row's failure ends it.
    """

    options: CallOptions
    prompts: Sequence[Prompt]
    cache: CacheMode | None = None
    strict: bool = False


@dataclass(slots=True)
class Question:
    """A group as one statement asks it, and what is known of it."""

    options: CallOptions  # with the model's defaults
    prompts: Sequence[Prompt]
    cache: CacheMode
    strict: bool = False
    outcomes: list[PlainOutcome | None] = field(default_factory=list)
    unknown: list[Prompt] = field(default_factory=list)  # distinct, neither known nor under way when looked up
    keys: dict[Prompt, bytes] = field(default_factory=dict)  # of the unknown ones

    def parts(self, rows: int) -> list[Question]:
        """The same question of at most so many prompts at a time, in their order."""
        return [
            replace(self, prompts=self.prompts[start : start + rows], outcomes=[], unknown=[], keys={})
            for start in range(0, len(self.prompts), rows)
        ]

    def missing(self) -> list[Prompt]:
        """The distinct prompts without an outcome, in their order."""
        asked = zip(self.prompts, self.outcomes, strict=True)
        return list(dict.fromkeys(prompt for prompt, outcome in asked if outcome is None))

    def fill(self, known: Mapping[Prompt, PlainOutcome]) -> None:
        """Put in outcomes that have become known."""
        if known:
            asked = zip(self.prompts, self.outcomes, strict=True)
            self.outcomes = [known.get(prompt) if outcome is None else outcome for prompt, outcome in asked]
