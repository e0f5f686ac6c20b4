"""The one place that knows what has been asked of a model: single flight, batches, usage, errors.

Every row of every query goes through a `Gateway`; nothing else calls a pool.
"""

from runtime.gateway.call import Asked, Outcome
from runtime.gateway.gateway import Gateway, GatewayClosed, WorkerPool
from runtime.gateway.statement import FailedRow, Statement, Usage

__all__ = ["Asked", "FailedRow", "Gateway", "GatewayClosed", "Outcome", "Statement", "Usage", "WorkerPool"]
