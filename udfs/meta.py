"""What a deployed model says of itself in SQL: `llm_meta('chat')`, and Byzer's request with `meta`.

Alone because both tell the same, one as a STRUCT and one as Byzer's JSON, and neither asks the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from runtime.errors import UserError, did_you_mean
from runtime.gateway import Gateway

MACRO = "llm_meta(model) AS llm_meta__udf(model::VARCHAR)"
TYPE = (
    "STRUCT(model VARCHAR, model_deploy_type VARCHAR, backend VARCHAR, task VARCHAR, architectures VARCHAR[], "
    "max_model_len BIGINT, dimension BIGINT, support_stream BOOLEAN, support_chat_template BOOLEAN, "
    "support_schema BOOLEAN, device VARCHAR, dtype VARCHAR, workers BIGINT, path VARCHAR)"
)
ARROW_TYPE = pa.struct(
    [
        *((name, pa.string()) for name in ("model", "model_deploy_type", "backend", "task")),
        ("architectures", pa.list_(pa.string())),
        *((name, pa.int64()) for name in ("max_model_len", "dimension")),
        *((name, pa.bool_()) for name in ("support_stream", "support_chat_template", "support_schema")),
        *((name, pa.string()) for name in ("device", "dtype")),
        ("workers", pa.int64()),
        ("path", pa.string()),
    ]
)


def meta(gateway: Gateway) -> dict[str, Any]:
    """The fields of `TYPE`; those that Byzer has too are called as there.

    `model_deploy_type` is 'saas' for a provider's model, 'proprietary' for one that runs here; `max_model_len` counts
    tokens of prompt and answer together, NULL where nothing bounds them or nobody knows.
    """
    info, pool = gateway.info, gateway.pool
    return {
        "model": gateway.name,
        "model_deploy_type": "saas" if info.device == "remote" else "proprietary",
        "backend": info.engine,
        "task": str(info.task),
        "architectures": list(info.architectures),
        "max_model_len": info.max_model_len,
        "dimension": info.dimension,
        "support_stream": info.streams,
        "support_chat_template": info.chat_template,
        "support_schema": info.schemas,
        "device": info.device,
        "dtype": info.dtype or None,
        "workers": pool.workers,
        "path": pool.spec.path or None,
    }


def meta_of(name: str, gateways: Mapping[str, Gateway]) -> dict[str, Any]:
    """`meta` of the model called `name`.

    Raises:
        UserError: model_unknown.
    """
    gateway = gateways.get(name.lower())
    if gateway:
        return meta(gateway)
    near = did_you_mean(name, gateways)
    known = f"Registered: {', '.join(sorted(gateways))}." if gateways else "No model is registered."
    raise UserError(
        f'There is no model "{name}".',
        code="model_unknown",
        hint=f'Did you mean "{near}"? {known}' if near else known,
    )


def asked_for(request: str) -> bool:
    """Whether a request of Byzer's asks for the model's meta instead of an answer."""
    said = json.loads(request)
    return isinstance(said, dict) and str(said.get("meta", "")).lower() == "true"
