"""The one place that knows what has been asked of a model: single flight, store, batches, retries, budgets, usage.

Every row of every query goes through a `Gateway`; nothing else calls a pool.
"""

from runtime.gateway.budget import Budget, Budgets, Limits
from runtime.gateway.call import Asked, Outcome, PlainOutcome, error_of, output_of
from runtime.gateway.dispatch import WorkerPool
from runtime.gateway.gateway import Gateway, GatewayClosed
from runtime.gateway.listener import Listener
from runtime.gateway.pace import RetryPolicy
from runtime.gateway.question import Group
from runtime.gateway.statement import (
    CACHE_MODES,
    CacheMode,
    Explained,
    FailedCall,
    FailedRow,
    Mode,
    Statement,
    Usage,
    row_failure,
)
from runtime.gateway.store import ResultStore, default_path

__all__ = [
    "CACHE_MODES",
    "Asked",
    "Budget",
    "Budgets",
    "CacheMode",
    "Explained",
    "FailedCall",
    "FailedRow",
    "Gateway",
    "GatewayClosed",
    "Group",
    "Limits",
    "Listener",
    "Mode",
    "Outcome",
    "PlainOutcome",
    "ResultStore",
    "RetryPolicy",
    "Statement",
    "Usage",
    "WorkerPool",
    "default_path",
    "error_of",
    "output_of",
    "row_failure",
]
