"""Images as bytes: read for a model, and written as PNG.

Alone because an image comes from anywhere: only formats that are read by plain decoders are taken, and none that
unfolds into more pixels than an image has.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from runtime.errors import RowError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000


def read_image(content: bytes) -> Image.Image:
    """The image in a file's content, upright and in RGB; the first one of several.

    Raises:
        RowError: image_bad, image_too_large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about many pixels: they are counted here
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:  # Pillow's own, for far more of them
        raise RowError(
            f"The image has more than {MAX_PIXELS // 1_000_000} million pixels.",
            code="image_too_large",
            hint="Make it smaller.",
        ) from None
    except Exception:  # a decoder may raise anything on a damaged file
        raise RowError(
            "The image cannot be read: it is damaged, or in another format.",
            code="image_bad",
            hint=f"Give one of {', '.join(FORMATS)}.",
        ) from None


def png(image: Image.Image) -> bytes:
    """The image as a PNG file; the same pixels give the same bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
