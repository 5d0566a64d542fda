"""One rule of what an image is, for training, evaluation and serving: formats, limits, orientation, transparency.

`serving/handler.py`, which travels alone, holds a copy of all that follows the imports; a test compares the two.
"""

import io
import warnings
import zlib

import numpy as np
from PIL import Image, ImageColor

# Not all that Pillow reads: it hands EPS to Ghostscript, for one.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # Pillow's own limit, at which it only warns: 256 MiB of RGB
MAX_ASPECT = 100  # the processor enlarges the short side: of a line of pixels that would be gigabytes
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
_PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts in which Pillow looks for it
_PNG_OPTIONAL = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # transparency, orientation, animation
_MAX_TEXT = 2**20  # bytes; of more Pillow refuses the image

# What Pillow warns of (palettes, damaged EXIF, TIFF tags) changes no pixel, and would come once an image or a worker.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_encoded(data: bytes | bytearray) -> Image.Image:
    """Opens the bytes of an image file, of which only the header is read.

    Raises:
        ValueError: If they are of none of `FORMATS`, or the image is larger or longer than the limits.
    """
    if not data:
        raise ValueError("it has no bytes")
    Image.init()
    try:
        image = Image.open(io.BytesIO(_without_texts(data)), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is damaged, or of none of the formats " + ", ".join(FORMATS)) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"its pixels are more than {MAX_PIXELS}") from error
    check_size(*image.size)
    return image


def image_suffixes() -> tuple[str, ...]:
    """How names of files of these formats end, in lower case."""
    Image.init()
    return tuple(suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS)


def check_size(width: int, height: int) -> None:
    """Refuses an image that would take too much memory.

    Raises:
        ValueError: If it has more than `MAX_PIXELS`, or a side is more than `MAX_ASPECT` times the other.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"of its {width} x {height} pixels one side is more than {MAX_ASPECT} times the other")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8; 1 where none can be read.

    Pillow's reader of TIFF turns the image as it decodes it, so that one is decoded here.
    """
    if image.format == "TIFF":
        image.load()
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF can raise anything, and says nothing of the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1  # some cameras write text


def upright_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """Decodes an image into upright RGB.

    Of an animation it is the first frame, and 16 bits a channel are scaled to 8.

    Args:
        image: Of any mode.
        background: Colour that shows through transparent pixels, as Pillow writes colours (`white`, `#ff8000`). None
            leaves transparency out, as transformers does: transparent pixels have whatever colour the file holds.

    Raises:
        ValueError: If its values have no known range.
    """
    turn = _TURNS.get(orientation_of(image))
    image = _eight_bits(image)
    if is_transparent(image) and (background is not None or image.mode == "P"):
        image = image.convert("RGBA")  # of palettes, Pillow would warn of the direct way to the same pixels
        if background is not None:
            canvas = Image.new("RGBA", image.size, colour(background))
            image = Image.alpha_composite(canvas, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def colour(text: str) -> str:
    """A colour by its name or as `#rrggbb`, as `#rrggbb`.

    Raises:
        ValueError: If there is no such colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a colour such as white or #ff8000, got {str(text)[:80]!r}") from error
    return f"#{red:02x}{green:02x}{blue:02x}"


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, or a colour or palette that stands for transparency."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16 bits to 8, which Pillow would clip."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError(f"its values from {values.min()} to {values.max()} do not fit 16 bits")
    scaled = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def _without_texts(data: bytes | bytearray) -> bytes | bytearray:
    """A PNG without what says nothing of its pixels: Pillow refuses images for a large or damaged text or profile."""
    if data[:8] != _PNG:
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if kind[:1].isupper() or kind in _PNG_OPTIONAL or _has_orientation(kind, data[start + 8 : end - 4]):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _has_orientation(kind: bytes | bytearray, content: bytes | bytearray) -> bool:
    """Whether a chunk of a PNG is a text with the orientation in it, of a size that Pillow reads."""
    if kind not in _PNG_TEXT or not content.startswith(_PNG_ORIENTATION):
        return False
    start = content.index(b"\0") + 1
    is_compressed = kind == b"zTXt" or (kind == b"iTXt" and content[start : start + 1] == b"\1")
    if not is_compressed:
        return len(content) < _MAX_TEXT
    if kind == b"iTXt":  # flag, method, language and translated keyword
        start = content.find(b"\0", content.find(b"\0", start + 2) + 1)
    try:
        return len(zlib.decompressobj().decompress(content[start + 1 :], _MAX_TEXT)) < _MAX_TEXT
    except zlib.error:
        return False
