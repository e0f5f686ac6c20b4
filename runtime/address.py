"""The address of a service, as a user types it.

Alone because keys are sent there: the same check stands before everything that talks to one.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from runtime.errors import UserError


def service_address(said: str, option: str) -> str:
    """`said` without a slash at its end.

    Args:
        option: how the user calls it, for the error.

    Raises:
        UserError: option_value, it is no address, or it holds a user, a key or a query.
    """
    try:
        parts = urlsplit(said.strip())
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{option} is no address of a service.",
            code="option_value",
            hint="Write it like http://127.0.0.1:8000/v1, without a user, a key or a question mark.",
        )
    return parts.geturl().rstrip("/")
