"""Images as they come: each kind is decoded, or refused in one sentence that names it."""

import io
import random
import struct
import subprocess
import sys
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deitlt_hf.data import ImageCollator, ImageDataset, image_processor, load_long_tailed, train_transform
from deitlt_hf.data.images import EncodedImage, decode_image

RANDOM = np.random.RandomState(0)


def picture(width=64, height=48):
    small = Image.fromarray(RANDOM.randint(0, 256, (6, 8, 3)).astype(np.uint8))
    return small.resize((width, height), Image.BICUBIC)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(data):
    return decode_image({"bytes": data, "path": None})


def difference(pixels, image):
    return np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGB", "RGBA", "1", "CMYK", "YCbCr", "LAB", "HSV"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_images_of_any_mode_become_rgb(mode, kind):
    """What Pillow can write in that mode and format is read as Pillow reads it, and a JPEG to the last bit."""
    image = picture().convert("P") if mode == "PA" else picture()
    try:
        data = encoded(image.convert(mode), kind)
    except (OSError, ValueError, KeyError):
        with pytest.raises((OSError, ValueError, KeyError)):
            encoded(image.convert(mode), kind)
        return
    try:
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:  # Pillow 12 writes a TIFF of YCbCr that it cannot read
        with pytest.raises(ValueError, match="cannot read the image"):
            decode(data)
        return
    pixels = decode(data)
    assert (pixels.shape, pixels.dtype) == ((48, 64, 3), np.uint8)
    assert difference(pixels, expected).max() == 0


def test_from_a_file(tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    pixels = decode_image({"bytes": None, "path": str(tmp_path / "image.png")})
    assert difference(pixels, image).max() == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(dtype, kind):
    """Pillow clips them at 255, which makes nearly every pixel white."""
    values = (np.arange(48 * 64).reshape(48, 64) * 21).astype(dtype)
    try:
        data = encoded(Image.fromarray(values), kind)
    except OSError:
        return
    pixels = decode(data)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert np.abs(pixels[..., 0] - values / 257).max() <= 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_on_their_side(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = EncodedImage(data, "photo")
    assert image.size == upright.size
    assert difference(image.decode(), upright).max() == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert difference(decode(data), frames[0]).max() <= 5


def bomb(side=20_000):
    """A PNG of a few kilobytes that would take 1.2 GB of memory."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj()
    content = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(200)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def cut(kind):
    data = encoded(picture(200, 150), kind)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no bytes"),
        (b"<html>404 not found</html>", "of none of the formats AVIF"),
        (cut("JPEG"), "incomplete or truncated"),
        (cut("PNG"), "truncated"),
        (cut("WEBP"), "(decod|truncated|read)"),
        (cut("GIF"), "truncated"),
        (bomb(), "its pixels are more than 89478485"),
        (bomb(9_500), "its 9500 x 9500 pixels are more than 89478485"),
        (encoded(Image.fromarray(RANDOM.rand(4, 4).astype(np.float32)), "TIFF"), "floating-point numbers, whose range"),
        (encoded(Image.fromarray(np.full((4, 4), -7, np.int32)), "TIFF"), "values from -7 to -7 do not fit 16 bits"),
    ],
    ids=["empty", "html", "jpeg", "png", "webp", "gif", "bomb", "small bomb", "float", "negative"],
)
def test_what_cannot_be_decoded_is_named(tmp_path, data, message):
    path = tmp_path / "bad image.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"cannot read the image .*bad image\.jpg: .*{message}.*--skip_bad_images\.$"):
        decode_image({"bytes": None, "path": str(path)})
    with pytest.raises(ValueError, match=rf"the image \(embedded in the data set\): .*{message}"):
        decode(data)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"cannot read the image /nowhere/a\.png: .*No such file"):
        decode_image({"bytes": None, "path": "/nowhere/a.png"})


def test_a_bomb_takes_no_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    code = f"""
import resource
from deitlt_hf.data.images import decode_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image({{"bytes": None, "path": {str(tmp_path / "bomb.png")!r}}})
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KiB
    assert "DecompressionBomb" not in done.stderr


def test_one_of_each_in_a_folder(tmp_path):
    """A folder with every kind of image trains, without the bad ones, which are counted."""
    good = {
        "grey.png": encoded(picture().convert("L")),
        "palette.gif": encoded(picture().convert("P"), "GIF"),
        "alpha.png": encoded(picture().convert("RGBA")),
        "cmyk.jpg": encoded(picture().convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(RANDOM.randint(0, 65_536, (40, 50)).astype(np.uint16))),
    }
    bad = {"empty.png": b"", "cut.jpg": cut("JPEG"), "bomb.png": bomb(), "page.jpg": b"<html>"}
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for name, data in good.items():
                (tmp_path / split / label / name).write_bytes(data)
    for name, data in bad.items():
        (tmp_path / "train" / "dog" / name).write_bytes(data)
    data = load_long_tailed(data_dir=str(tmp_path), skip_bad_images=True)
    assert len(data["train"]) == 10
    processor = image_processor(32)
    rows = ImageDataset(data["train"], "image", "label", {"pixel_values": train_transform(processor)})
    batch = ImageCollator(processor)([rows[row] for row in range(len(rows))])
    assert batch["pixel_values"].shape == (10, 32, 32, 3)
    plain = ImageDataset(data["test"], "image", "label")
    assert ImageCollator(processor)([plain[row] for row in range(10)])["pixel_values"].shape == (10, 3, 32, 32)


# ---- Reduced decoding ----


def photograph(width, height):
    """Detail at all scales, about as much of it as photographs have."""
    layers = []
    for cells in (4, 16, 64, 256):
        noise = RANDOM.randint(0, 256, (max(height * cells // width, 2), cells, 3)).astype(np.uint8)
        layers.append(np.asarray(Image.fromarray(noise).resize((width, height), Image.BICUBIC)) / cells**0.5)
    pixels = sum(layers)
    return Image.fromarray((255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8))


@pytest.mark.parametrize(("size", "crop"), [(64, "random_resized"), (64, "padded"), (100, "random_resized")])
def test_large_photographs_are_decoded_at_a_fraction(size, crop):
    """Nearly the same pixels, from a fraction of the work."""
    data = encoded(photograph(1600, 1200), "JPEG", quality=92)
    transform = train_transform(image_processor(size), crop, auto_augment=None, random_erasing=0)
    sizes = []
    for seed in range(12):
        results = []
        for image in (EncodedImage(data, "photo"), EncodedImage(data, "photo").decode()):
            random.seed(seed)
            torch.manual_seed(seed)
            results.append(transform(image).int())
            if isinstance(image, EncodedImage):
                sizes.append(image._opened.width)
        assert (results[0] - results[1]).abs().float().mean() < 0.5
    assert min(sizes) == (200 if crop == "padded" or size == 64 else 400)


@pytest.mark.parametrize(
    ("region", "size", "width"),
    [
        ((0, 0, 150, 200), (18, 18), 50),
        ((0, 0, 150, 200), (37, 37), 100),
        ((0, 0, 150, 200), (38, 38), None),
        ((10, 20, 128, 128), (32, 32), 100),
        ((10, 20, 127, 128), (32, 32), None),
    ],
)  # fmt: skip
def test_a_region_is_decoded_at_twice_its_size_at_least(region, size, width):
    image = EncodedImage(encoded(picture(200, 150), "JPEG"), "photo")
    pixels = image.decode_region(region, size)
    assert (pixels is None) == (width is None)
    if width is not None:
        assert pixels.shape == (*size, 3)
        assert image._opened.width == width
    assert EncodedImage(encoded(picture(200, 150)), "photo").decode_region(region, size) is None


# ---- Cache ----


def rows_of(images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (len(images) // 2)}, features)


def test_small_images_are_decoded_once(monkeypatch):
    from deitlt_hf.data import images as module

    data = rows_of([picture(12, 10) for _ in range(5)] + [picture(10, 12)])
    dataset = ImageDataset(data, "image", "label")
    opened = []
    open_image = module.open_image
    monkeypatch.setattr(module, "open_image", lambda image: (opened.append(1), open_image(image))[1])
    passes = [[dataset[row]["image"].copy() for row in range(6)] for _ in range(3)]
    assert len(opened) == 6 + 2  # the one of another size, each time
    for first, second in zip(*passes[:2], strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_fill_the_cache_together(context):
    data = rows_of([picture(12, 10) for _ in range(40)])
    dataset = ImageDataset(data, "image", "label", {"pixel_values": train_transform(image_processor(8), "padded")})
    loader = torch.utils.data.DataLoader(dataset, 8, num_workers=2, multiprocessing_context=context)
    assert sum(len(batch["labels"]) for batch in loader) == 40
    assert dataset._cache[1].all() == (context == "fork")


def test_large_images_are_not_kept():
    assert ImageDataset(rows_of([picture(200, 150)] * 2), "image", "label")._cache is None
    assert ImageDataset(rows_of([]), "image", "label")._cache is None


def test_orientation_that_is_text():
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"top")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    data = encoded(picture(), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == "top"
    assert decode(data).shape == (48, 64, 3)
