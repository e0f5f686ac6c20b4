"""What one rank does: build the model, train it, leave checkpoints and the trained model in the job's folder."""

from __future__ import annotations

from runtime.training.plan import TrainingPlan


def train(plan: TrainingPlan) -> None:
    """Train as this process's rank; RANK, WORLD_SIZE and LOCAL_RANK say which, as torchrun sets them."""
    raise NotImplementedError
