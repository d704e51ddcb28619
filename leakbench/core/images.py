"""Pictures out of files that somebody else may have made."""

import io
import warnings

from PIL import Image

MAX_PIXELS = 2**24
"""No picture of a run has more pixels."""

IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats of images that are read from a user's folder: of others, some run other programs."""


def decoded(png: bytes) -> Image.Image | None:
    """Return a PNG as it is, read to its end; None for anything else, or for more than ``MAX_PIXELS`` pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                image.load()
                return image
    except Exception:  # whatever a damaged or hostile file makes Pillow raise
        return None


def centre(image: Image.Image, size: tuple[int, int], zoom: float = 1.0) -> Image.Image:
    """Return an image scaled to fill ``zoom`` times a size (W, H), its centre cut out."""
    least = [round(side * zoom) for side in size]
    scale = max(side / own for side, own in zip(least, image.size))
    width, height = (max(side, round(own * scale)) for side, own in zip(least, image.size))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))
