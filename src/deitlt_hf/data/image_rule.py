"""Decodes image files by one rule in training, evaluation and serving: formats, limits, orientation, transparency.

The handler.py in a model folder contains this module (`hub/handler_file.py`), so it imports NumPy, Pillow and the
standard library only.
"""

import contextlib
import io
import zlib

import numpy as np
from PIL import Image, ImageColor

# Not all formats that Pillow reads: for EPS, Pillow would run Ghostscript.
FORMATS: tuple[str, ...] = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
with contextlib.suppress(ImportError):  # it decodes the photos from phones, which Pillow alone cannot
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS = (*FORMATS, "HEIF")
MAX_PIXELS = 89_478_485  # Pillow's limit, at which Pillow itself only warns: 256 MiB of RGB
MAX_ASPECT = 100  # the processor enlarges the short side, so a line of pixels would become gigabytes
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # where Pillow looks for the orientation
_PNG_OPTIONAL = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # transparency, orientation, animation
_MAX_TEXT = 2**20  # bytes; Pillow refuses an image with a larger text


def open_encoded(data: bytes | bytearray) -> Image.Image:
    """Opens an image from the bytes of a file. Only the header is read.

    Raises:
        ValueError: If the format is not in `FORMATS`, or the image exceeds the limits of size or aspect ratio.
    """
    if not data:
        raise ValueError("it has no bytes")
    Image.init()
    try:
        image = Image.open(io.BytesIO(_without_texts(data)), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is damaged, or of none of the formats " + ", ".join(FORMATS)) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {MAX_PIXELS} pixels") from error
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """Refuses an image that would take too much memory.

    Raises:
        ValueError: If it has more than `MAX_PIXELS`, or a side is more than `MAX_ASPECT` times the other.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"its {width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"one side of its {width} x {height} pixels is more than {MAX_ASPECT} times the other")


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation that is still to be applied, 1 to 8; 1 if it cannot be read.

    A TIFF is decoded here, because Pillow's TIFF reader turns the image while it decodes it.
    """
    if image.format == "TIFF":
        image.load()
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # corrupt EXIF can raise any exception, and does not affect the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1  # some cameras write text


def upright_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """Decodes an image into upright RGB.

    An animation gives its first frame. 16 bits per channel are scaled to 8.

    Args:
        image: An image of any mode.
        background: Colour behind transparent pixels, in Pillow's notation (`white`, `#ff8000`). None ignores
            transparency, as transformers does: transparent pixels get the colour that the file holds for them.

    Raises:
        ValueError: If the range of the values is not known.
    """
    turn = _TURNS.get(orientation_of(image))  # before the conversions below, which drop the EXIF data
    image = _eight_bits(image)
    if is_transparent(image) and (background is not None or image.mode == "P"):
        # For a palette, the direct conversion to RGB gives the same pixels, but Pillow warns.
        image = image.convert("RGBA")
        if background is not None:
            canvas = Image.new("RGBA", image.size, colour(background))
            image = Image.alpha_composite(canvas, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def colour(text: str) -> str:
    """Converts the name of a colour, or `#rrggbb`, to `#rrggbb`.

    Raises:
        ValueError: If the text is not a colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a colour such as white or #ff8000, got {str(text)[:80]!r}") from error
    return f"#{red:02x}{green:02x}{blue:02x}"


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, a transparent colour, or a palette with transparency."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits per channel to 8; Pillow's own conversion would clip."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError(f"its values from {values.min()} to {values.max()} do not fit 16 bits")
    # 65535 / 255 is 257; half of it rounds to the nearest value.
    scaled = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def _without_texts(data: bytes | bytearray) -> bytes | bytearray:
    """Removes from a PNG the chunks that do not affect its pixels.

    Pillow refuses an image because of a large or corrupt text or profile, although its pixels are intact.
    """
    if data[:8] != _PNG:
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        # A capital first letter marks the chunks that a decoder must understand (PNG specification, 5.4).
        if kind[:1].isupper() or kind in _PNG_OPTIONAL or _has_orientation(kind, data[start + 8 : end - 4]):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _has_orientation(kind: bytes | bytearray, content: bytes | bytearray) -> bool:
    """Whether a PNG chunk is a text that can hold the orientation, of a size that Pillow reads."""
    if kind not in _PNG_TEXT or not content.startswith(_PNG_ORIENTATION):
        return False
    start = content.index(b"\0") + 1
    is_compressed = kind == b"zTXt" or (kind == b"iTXt" and content[start : start + 1] == b"\1")
    if not is_compressed:
        return len(content) < _MAX_TEXT
    if kind == b"iTXt":  # skip flag, method, language and translated keyword
        start = content.find(b"\0", content.find(b"\0", start + 2) + 1)
    try:
        return len(zlib.decompressobj().decompress(content[start + 1 :], _MAX_TEXT)) < _MAX_TEXT
    except zlib.error:
        return False
