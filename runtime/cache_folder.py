"""The folder in which this package keeps what it can make again: answers, and checkpoints in another form.

Alone because several of its tenants must find the same place, and none of them owns the others.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SQLEXT_CACHE_DIR, $XDG_CACHE_HOME/sqlext or ~/.cache/sqlext; it need not be there yet."""
    if said := os.environ.get("SQLEXT_CACHE_DIR"):
        return Path(os.path.expanduser(said))
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # as the XDG specification wants it
        caches = os.path.expanduser("~/.cache")
    return Path(caches) / "sqlext"
