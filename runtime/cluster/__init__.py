"""Ray, and nothing else of the kind: workers, pools of them, and what is deployed. The only importer of ray."""

from runtime.cluster.adapted import AdaptedPool
from runtime.cluster.connection import (
    ClusterInfo,
    Resources,
    cluster_address,
    connect,
    free,
    shutdown,
    would_start,
)
from runtime.cluster.deployments import (
    DeploymentInfo,
    DeployProgress,
    attach,
    deploy,
    deployments,
    exists,
    remove,
    retire,
    retire_older,
)
from runtime.cluster.nodes import machines
from runtime.cluster.pool import Pool
from runtime.cluster.worker import WorkerInfo

__all__ = [
    "AdaptedPool",
    "ClusterInfo",
    "DeployProgress",
    "DeploymentInfo",
    "Pool",
    "Resources",
    "WorkerInfo",
    "attach",
    "cluster_address",
    "connect",
    "deploy",
    "deployments",
    "exists",
    "free",
    "machines",
    "remove",
    "retire",
    "retire_older",
    "shutdown",
    "would_start",
]
