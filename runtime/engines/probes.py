"""The first question of every model: asked when it is deployed, so that one that loads and cannot run is found.

Alone because what a model can be asked depends on its task.
"""

from __future__ import annotations

import io
import wave

from runtime.spec import CallOptions, Message, Prompt, Task


def probe(task: Task) -> tuple[CallOptions, Prompt]:
    """What to ask a model that does this, and how, so that it is soon done."""
    match task:
        case Task.GENERATE:
            return CallOptions(max_tokens=1), "ok"
        case Task.RANK:
            return CallOptions(), (Message("query", "ok"), Message("text", "ok"))
        case Task.TRANSCRIBE:
            return CallOptions(max_tokens=1), (Message("user", "", (_silence(),)),)
        case Task.DRAW:
            return CallOptions(extra=(("sampling_steps", 2),)), "ok"
        case Task.EMBED | Task.CLASSIFY | Task.SPEAK:
            return CallOptions(), "ok"


def _silence() -> bytes:
    """A tenth of a second of nothing, as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(3_200))
    return file.getvalue()
