"""Recordings as bytes: read for a model at its own rate, and written as WAV.

Alone because a recording comes from anywhere: it is measured before it is decoded.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import soundfile
from scipy.signal import resample_poly

from runtime.errors import RowError

MAX_SECONDS = 4 * 3600
FORMATS = "WAV, FLAC, OGG or MP3"


def read_recording(content: bytes, rate: int) -> Any:
    """The recording in a file's content: float32 samples from -1 to 1, one channel, `rate` of them in a second.

    Raises:
        RowError: recording_bad, recording_empty, recording_too_long.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            seconds = file.frames / file.samplerate
            if seconds <= MAX_SECONDS:
                samples, own_rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, ZeroDivisionError):
        raise RowError(
            "The recording cannot be read: it is damaged, or in another format.",
            code="recording_bad",
            hint=f"Give {FORMATS}.",
        ) from None
    if seconds > MAX_SECONDS:
        raise RowError(
            f"The recording is {seconds / 3600:.1f} hours long; at most {MAX_SECONDS // 3600} are read.",
            code="recording_too_long",
            hint="Cut it into parts.",
        )
    if not len(samples):
        raise RowError("The recording is empty.", code="recording_empty")
    mono = np.nan_to_num(samples.mean(axis=1), posinf=0.0, neginf=0.0)
    return mono if own_rate == rate else resampled(mono, own_rate, rate)


def resampled(samples: Any, own_rate: int, rate: int) -> Any:
    """The samples of one second `own_rate`, as `rate` of them; float32."""
    common = math.gcd(own_rate, rate)
    return resample_poly(samples, rate // common, own_rate // common).astype(np.float32)


def wav(samples: Any, rate: int) -> bytes:
    """Float samples from -1 to 1, one channel, as a WAV file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1.0, 1.0), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()
