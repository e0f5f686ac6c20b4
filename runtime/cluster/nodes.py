"""The machines of the connected cluster: what memory and which GPUs Ray says that each has.

Alone because it asks Ray's books only: no process is started on any node to look.
"""

from __future__ import annotations

import sys
from typing import Any

from runtime.checkpoints.suitability import Machine, this_machine
from runtime.cluster.connection import live_nodes, node_id, ray

# Ray says which kind of GPU a node has, not its memory.
_GPU_GB = {
    "V100": 16, "P100": 16, "T4": 16, "P4": 8, "K80": 12, "A10G": 24, "L4": 24, "L40S": 48, "A100": 40,
    "A100-40G": 40, "A100-80G": 80, "H100": 80, "H20": 96, "H200": 141, "B200": 180, "B300": 270, "GB200": 186,
}  # fmt: skip


def machines() -> list[Machine]:
    """Every living node of the cluster; this machine alone when this process is connected to none."""
    here = this_machine()
    if "ray" not in sys.modules or not ray.is_initialized():
        return [here]
    own = node_id()
    found = [machine(node) for node in live_nodes() if node["NodeID"] != own]
    return [here, *found]


def machine(node: dict[str, Any]) -> Machine:
    """What Ray says of one node."""
    resources = node["Resources"]
    memory = resources.get("memory", 0) + resources.get("object_store_memory", 0)
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    each = min((_GPU_GB.get(kind, 0) for kind in kinds), default=0) * 10**9
    return Machine(str(node["NodeManagerHostname"]), int(memory), (each,) * int(resources.get("GPU", 0)))
