"""Training on the cluster: the ranks of a job on Ray workers."""

from __future__ import annotations

from runtime.training import loop
from runtime.training.plan import TrainingPlan


def train_on_ranks(plan: TrainingPlan) -> None:
    """Run the plan's ranks until they have ended; in the process of the job.

    Raises:
        SqlextError: the training failed; what it had saved is intact.
    """
    loop.train(plan)
