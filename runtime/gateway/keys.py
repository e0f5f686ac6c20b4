"""The key of a call: 16 bytes that stand for everything that decides its answer.

Alone because stored answers are found by it, later and by other processes: equal model content, equal options and
equal prompt give the same key on every machine; a change of any of them gives another.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

from runtime.spec import CallOptions, Prompt

KEY_BYTES = 16
_MEDIA = 1 << 63  # added to a length: what follows is no text


class CallKeys:
    """Keys of calls to one model with one set of options.

    Args:
        fingerprint: the content of what answers.
        options: the call's options with the deploy's defaults under them. Options that compare equal give equal keys.
    """

    __slots__ = ("_conversation", "_text")

    def __init__(self, fingerprint: str, options: CallOptions) -> None:
        said = [(f.name, _plain(getattr(options, f.name))) for f in fields(options)]
        told = repr((fingerprint, [(name, value) for name, value in said if value not in (None, ())]))
        # A digest leaves room for a short prompt in the first block of the hash, and one block is the least there is.
        shared = hashlib.blake2b(_encode(told), digest_size=32).digest()
        self._text = hashlib.blake2b(shared + b"t", digest_size=KEY_BYTES)
        self._conversation = hashlib.blake2b(shared + b"c", digest_size=KEY_BYTES)

    def of(self, prompt: Prompt) -> bytes:
        """The 16 bytes for `prompt`."""
        if isinstance(prompt, str):
            made = self._text.copy()
            made.update(prompt.encode("utf-8", "surrogatepass"))
            return made.digest()
        made = self._conversation.copy()
        for message in prompt:
            for part in (_encode(message.role), _encode(message.content)):
                made.update(len(part).to_bytes(8, "little"))
                made.update(part)
            for media in message.media:
                made.update((_MEDIA | len(media)).to_bytes(8, "little"))
                made.update(media)
        return made.digest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """The value as one of all that compare equal to it: 1 for 1.0 and True."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    return int(value) if isinstance(value, int) else value
