"""Pictures of the report: small JPEGs inside the HTML file."""

import base64
import io

from PIL import Image

SIDE = 168
QUALITY = 80


def thumbnail(image: Image.Image, *, side: int = SIDE) -> str:
    """Return an image as a data URI, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
