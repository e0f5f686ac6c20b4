"""Out of a GPU's memory: what was wanted, what there was, and what to do next."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from runtime.engines.loading import device_memory, loading
from runtime.errors import DeployError, OutOfMemory

WHOLE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 713.00 MiB is "
    "free. Process 3011507 has 139.10 GiB memory in use. Of the allocated memory 138.00 GiB is allocated by PyTorch."
)
PART = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 99.00 GiB is "
    "free. 34.95 GiB allowed; Of the allocated memory 34.94 GiB is allocated by PyTorch."
)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (WHOLE, ": 2.00 GiB more were wanted, the GPU has 139.80 GiB, of which 713.00 MiB were free."),
        (
            PART,
            ": 20.00 MiB more were wanted, the GPU has 139.80 GiB, of which 99.00 GiB were free, this worker may use "
            "34.95 GiB of it.",
        ),
        ("CUDA error: out of memory", "the device."),
    ],
)
def test_a_batch_that_does_not_fit_tells_the_numbers(said, told):
    """As torch says them; without them, the rest of the message stands alone."""
    with pytest.raises(OutOfMemory) as caught, device_memory():
        raise torch.OutOfMemoryError(said)
    assert caught.value.message.endswith(told)
    assert "backend.max_num_seqs" in (caught.value.hint or "")


def test_a_model_that_does_not_fit_tells_the_numbers():
    """With its own size."""
    checkpoint = SimpleNamespace(path="/models/big", bytes=2.5e9, model_type="llama")
    with pytest.raises(DeployError) as caught, loading(checkpoint):  # type: ignore[arg-type]
        raise torch.OutOfMemoryError(WHOLE)
    assert "(2.5 GB)" in caught.value.message
    assert "2.00 GiB more were wanted" in caught.value.message
