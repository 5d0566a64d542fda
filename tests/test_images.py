"""Tests of image decoding: each kind of file is decoded, or refused with one message that names it."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import PIL
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from transformers import AutoImageProcessor

from deitlt_hf import (
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.data import ImageCollator, ImageDataset, image_processor, images, load_long_tailed, train_transform
from deitlt_hf.data.columns import standard_columns
from deitlt_hf.data.image_rule import open_encoded, upright_rgb
from deitlt_hf.data.images import EncodedImage, decoder_versions, open_image
from deitlt_hf.data.sources.files import is_image, not_read
from deitlt_hf.serving.prediction import load_handler
from helpers import bomb, cut, encoded, picture

RANDOM = np.random.RandomState(0)


def decode(data):
    return open_image({"bytes": data, "path": None}).decode()


def difference(pixels, image):
    return np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGB", "RGBA", "1", "CMYK", "YCbCr", "LAB", "HSV"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_images_of_any_mode_become_rgb(mode, kind):
    """Images of any mode become RGB.

    Whatever Pillow can write in that mode and format is read as Pillow reads it, and a JPEG bit for bit.
    """
    image = picture().convert("P") if mode == "PA" else picture()
    try:
        data = encoded(image.convert(mode), kind)
    except (OSError, ValueError, KeyError):
        with pytest.raises((OSError, ValueError, KeyError)):
            encoded(image.convert(mode), kind)
        return
    try:
        expected = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError:  # Pillow 12 writes YCbCr TIFF files that it cannot read
        with pytest.raises(ValueError, match="cannot read the image"):
            decode(data)
        return
    pixels = decode(data)
    assert (pixels.shape, pixels.dtype) == ((48, 64, 3), np.uint8)
    assert difference(pixels, expected).max() == 0


def test_from_a_file(tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    pixels = open_image({"bytes": None, "path": str(tmp_path / "image.png")}).decode()
    assert difference(pixels, image).max() == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_images_are_scaled(dtype, kind):
    """16-bit images are scaled to 8 bits; Pillow clips them at 255, which makes nearly every pixel white."""
    values = (np.arange(48 * 64).reshape(48, 64) * 21).astype(dtype)
    try:
        data = encoded(Image.fromarray(values), kind)
    except OSError:
        return
    pixels = decode(data)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert np.abs(pixels[..., 0] - values / 257).max() <= 0.5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(kind):
    frames = [Image.new("RGB", (20, 10), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert difference(decode(data), frames[0]).max() <= 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no bytes"),
        (b"<html>404 not found</html>", "of none of the formats AVIF"),
        (cut("JPEG"), "incomplete or truncated"),
        (cut("PNG"), "truncated"),
        (cut("WEBP"), "(decod|truncated|read)"),
        (cut("GIF"), "truncated"),
        (bomb(), "it has more than 89478485 pixels"),
        (bomb(9_500), "its 9500 x 9500 pixels are more than the limit of 89478485"),
        (encoded(Image.fromarray(RANDOM.rand(4, 4).astype(np.float32)), "TIFF"), "floating-point numbers, whose range"),
        (encoded(Image.fromarray(np.full((4, 4), -7, np.int32)), "TIFF"), "values from -7 to -7 do not fit 16 bits"),
    ],
    ids=["empty", "html", "jpeg", "png", "webp", "gif", "bomb", "small bomb", "float", "negative"],
)
def test_files_that_cannot_be_decoded_are_named(tmp_path, data, message):
    path = tmp_path / "bad image.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad image\.jpg: .*{message}.*--skip_bad_images\.$"):
        open_image({"bytes": None, "path": str(path)}).decode()
    with pytest.raises(ValueError, match=rf"the image \(embedded in the data set\): .*{message}"):
        decode(data)


def test_pillow_decodes_if_torchvision_was_built_without_jpeg(monkeypatch):
    assert images._jpeg_decoder() is not None
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace())
    assert images._jpeg_decoder() is None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "quality": 60}], ids=["baseline", "progressive"])
def test_jpegs_are_decoded_alike_without_torchvision(monkeypatch, mode, options):
    data = encoded(picture(101, 67).convert(mode), "JPEG", **options)
    assert decoder_versions().keys() - {"pillow-heif"} == {"pillow", "torchvision"}
    found = decode(data)
    monkeypatch.setattr(images, "decode_jpeg", None)
    assert decoder_versions().keys() - {"pillow-heif"} == {"pillow"}
    assert np.abs(decode(data).astype(int) - found).max() <= 4


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"cannot read the image /nowhere/a\.png: .*No such file"):
        open_image({"bytes": None, "path": "/nowhere/a.png"}).decode()


def test_a_bomb_takes_no_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    code = f"""
import resource
from deitlt_hf.data.images import open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image({{"bytes": None, "path": {str(tmp_path / "bomb.png")!r}}}).decode()
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KiB
    assert "DecompressionBomb" not in done.stderr


def test_a_folder_with_every_kind_of_image_trains(tmp_path):
    """A folder with every kind of image can be trained on; corrupt images are left out and counted."""
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
    """An image with detail at all scales, about as much as photographs have."""
    layers = []
    for cells in (4, 16, 64, 256):
        noise = RANDOM.randint(0, 256, (max(height * cells // width, 2), cells, 3)).astype(np.uint8)
        layers.append(np.asarray(Image.fromarray(noise).resize((width, height), Image.BICUBIC)) / cells**0.5)
    pixels = sum(layers)
    return Image.fromarray((255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8))


@pytest.mark.parametrize(("size", "crop"), [(64, "random_resized"), (64, "padded"), (100, "random_resized")])
def test_large_photographs_are_decoded_at_a_fraction(size, crop):
    """Large photographs are decoded at a fraction of their size, which costs less and gives nearly the same pixels."""
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
    monkeypatch.setattr(module, "open_image", lambda *args: (opened.append(1), open_image(*args))[1])
    passes = [[dataset[row]["image"].copy() for row in range(6)] for _ in range(3)]
    assert len(opened) == 6 + 2  # the image of another size is decoded each time
    for first, second in zip(*passes[:2], strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
@pytest.mark.slow
def test_workers_fill_the_cache_together(context, workers):
    data = rows_of([picture(12, 10) for _ in range(40)])
    dataset = ImageDataset(data, "image", "label", {"pixel_values": train_transform(image_processor(8), "padded")})
    loader = torch.utils.data.DataLoader(dataset, 8, num_workers=workers, multiprocessing_context=context)
    assert sum(len(batch["labels"]) for batch in loader) == 40
    assert dataset._cache[1].all() == (context == "fork")


def test_large_images_are_not_cached():
    assert ImageDataset(rows_of([picture(200, 150)] * 2), "image", "label")._cache is None
    assert ImageDataset(rows_of([]), "image", "label")._cache is None


def test_an_orientation_that_is_text_is_ignored():
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"top")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    data = encoded(picture(), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == "top"
    assert decode(data).shape == (48, 64, 3)


# ---- Details of decoding ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO", "GIF", "BMP", "JPEG2000", "PPM"])
def test_the_reported_size_is_that_of_the_decoded_image(kind):
    """The reported size is that of the decoded image, by which crops are chosen.

    Pillow's TIFF readers apply the orientation by themselves; its other readers do not.
    """
    for orientation in range(1, 9):
        for size, mode in (((33, 64), "RGB"), ((7, 5), "RGB"), ((40, 3), "L")):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = encoded(picture(*size).convert(mode), kind, exif=exif)
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            image = EncodedImage(data, "photo")
            assert image.size == upright.size
            assert difference(image.decode(), upright).max() == 0
            train_transform(image_processor(8))(EncodedImage(data, "photo"))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg"])
def test_regions_of_a_rotated_tiff(compression):
    """Regions of a rotated TIFF from a camera have the shape of the chosen crop."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(400, 300), "TIFF", exif=exif, compression=compression)
    transform = train_transform(image_processor(32), auto_augment=None, random_erasing=0)
    for seed in range(10):
        results = []
        for image in (EncodedImage(data, "photo"), EncodedImage(data, "photo").decode()):
            torch.manual_seed(seed)
            random.seed(seed)
            results.append(transform(image))
        assert torch.equal(*results)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


LARGE = zlib.compress(bytes(3 * 2**20))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (chunk(b"iCCP", b"name\0\0" + LARGE), b""),
        (chunk(b"zTXt", b"key\0\0" + LARGE), b""),
        (b"", chunk(b"zTXt", b"key\0\0" + LARGE)),
        (chunk(b"iTXt", b"key\0\1\0\0\0" + LARGE), b""),
        (chunk(b"zTXt", b"Raw profile type exif\0\0" + LARGE), b""),
        (chunk(b"zTXt", b"key\0\7"), b""),
        (chunk(b"tEXt", b"key\0text")[:-1] + b"?", b""),
        (chunk(b"pHYs", b""), b""),
        (chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), b""),
    ],
    ids=["profile", "text", "text after", "utf-8", "exif", "method", "checksum", "density", "damaged exif"],
)
def test_a_png_with_complete_pixels_is_read(before, after):
    """A PNG with complete pixels is read, although Pillow refuses files with large or damaged texts and profiles."""
    image = picture()
    whole = encoded(image)
    assert difference(decode(whole[:33] + before + whole[33:-12] + after + whole[-12:]), image).max() == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_an_orientation_in_a_text_chunk_of_a_png_is_applied(compressed):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>', zip=compressed)
    data = encoded(picture(), pnginfo=texts)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (48, 64)
    assert difference(decode(data), upright).max() == 0


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_damaged_exif_is_ignored(exif):
    data = encoded(picture(), "JPEG", exif=exif)
    assert difference(decode(data), Image.open(io.BytesIO(data))).max() == 0


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_unlisted_formats_are_not_opened(kind):
    with pytest.raises(ValueError, match="of none of the formats AVIF, BMP"):
        decode(encoded(picture(), kind))


@pytest.mark.parametrize("size", [(1000, 1), (1, 101)])
def test_an_extreme_aspect_ratio_is_refused(size):
    with pytest.raises(ValueError, match=r"one side of its .* pixels is more than 100 times the other"):
        decode(encoded(Image.new("RGB", size)))


def see_through(mode):
    """An image with every level of transparency, and the options for saving it."""
    image = picture(16, 16).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    options = {"P": {"transparency": bytes(range(256))}, "L": {"transparency": 7}, "RGB": {"transparency": (1, 2, 3)}}
    return image.convert(mode), options.get(mode, {})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_a_background_is_composited(mode, recwarn):
    """Transparent images are composited over the given background.

    Without a background the pixels are those of transformers' pipeline. Pillow's warning about palettes does not
    appear.
    """
    image, options = see_through(mode)
    data = encoded(image, **options)
    opened = Image.open(io.BytesIO(data)).convert("RGBA")
    red = Image.alpha_composite(Image.new("RGBA", image.size, "red"), opened)
    assert difference(open_image({"bytes": data, "path": None}, background="red").decode(), red).max() == 0
    pixels = decode(data)
    assert not [warning for warning in recwarn if "Palette" in str(warning.message)]
    assert difference(pixels, Image.open(io.BytesIO(data))).max() == 0


def test_a_background_under_sixteen_bit_images():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    data = encoded(Image.fromarray(values), transparency=77 * 257)
    pixels = open_image({"bytes": data, "path": None}, background="white").decode()
    assert np.array_equal(pixels[..., 0], np.where(np.arange(256) == 77, 255, np.arange(256)).reshape(16, 16))


@pytest.mark.parametrize("text", ["whitish", "#12", "", "12,13"])
def test_an_unknown_background_is_refused(text):
    with pytest.raises(ValueError, match="background must be a colour such as white"):
        image_processor(8, background=text)


def test_a_background_is_saved_with_the_processor(tmp_path):
    image_processor(8, background="white").save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).background == "#ffffff"
    assert not hasattr(image_processor(8), "background")


def test_pipes_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in ((tmp_path / "pipe.png", "not a file"), (tmp_path, "not a file"), ("/dev/zero", "not a file")):
        with pytest.raises(ValueError, match=f"cannot read the image {path}: it is {message}"):
            open_image({"bytes": None, "path": str(path)}).decode()


def test_an_empty_cell_is_named_by_its_row(tmp_path, caplog):
    rows = rows_of([{"bytes": encoded(picture(100, 80))} if row != 5 else None for row in range(12)])
    rows.save_to_disk(str(tmp_path))
    data = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.25)
    split, place = next(
        (split, rows["source_index"].index(5)) for split, rows in data.items() if 5 in rows["source_index"]
    )
    with pytest.raises(ValueError, match="row 5 of the column image is empty"):
        ImageDataset(data[split], "image", "label")[place]
    skipped = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.25, skip_bad_images=True)
    assert sum(map(len, skipped.values())) == 11
    assert "row 5 of the column image is empty" in caplog.text
    assert "left out 1 unreadable images" in caplog.text


def test_a_broken_image_of_a_data_set_is_named_by_its_row():
    rows = rows_of([{"bytes": encoded(picture(100, 80))}, {"bytes": b"rubbish" * 1000, "path": "a.png"}])
    with pytest.raises(ValueError, match=r"a\.png \(row 1 of the column image\): it is damaged") as error:
        ImageDataset(rows, "image", "label")[1]
    assert len(str(error.value)) < 400


def test_the_decoders_are_named():
    assert decoder_versions()["pillow"] == PIL.__version__


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        pyarrow.struct([("path", pyarrow.large_string()), ("bytes", pyarrow.large_binary())]),
        pyarrow.struct([("bytes", pyarrow.binary_view())]),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
        pyarrow.string(),
        pyarrow.large_string(),
    ],
    ids=str,
)
@pytest.mark.parametrize("column", ["image", "picture"])
def test_tables_of_other_libraries_are_read(tmp_path, kind, column):
    """Tables written by other libraries are read; without the metadata of datasets, an image column has no type."""
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    is_path = str(kind).removeprefix("large_") == "string"
    cell = "a.png" if is_path else {"bytes": data, "path": "a.png"} if pyarrow.types.is_struct(kind) else data
    if pyarrow.types.is_struct(kind) and kind.get_field_index("path") < 0:
        cell = {"bytes": data}
    table = pyarrow.table({column: pyarrow.array([cell] * 8, kind), "label": ["a", "b"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    named = {"image_column": column, "label_column": "label"} if is_path and column == "picture" else {}
    splits = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.25, **named)
    assert difference(ImageDataset(splits["test"], "image", "label")[0]["image"], picture_of(data)).max() == 0


def picture_of(data):
    return Image.open(io.BytesIO(data))


def test_a_column_without_images_is_refused():
    rows = datasets.Dataset.from_dict({"image": [1, 2], "label": ["a", "b"]})
    with pytest.raises(ValueError, match="'image' holds no images"):
        standard_columns(datasets.DatasetDict(train=rows), "image", "label")


def test_files_that_are_not_images_are_counted(tmp_path, caplog):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for name in ("a.png", "b.png"):
            (tmp_path / label / name).write_bytes(encoded(picture()))
        for name in ("a.PSD", "b.psd", "c.eps", "nothing", ".hidden"):
            (tmp_path / label / name).write_bytes(b"x")
    (tmp_path / "loose.png").write_bytes(encoded(picture()))
    data = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.5)
    assert sum(map(len, data.values())) == 4
    assert "files that are not read: 4 .psd, 2 without a suffix, 2 .eps" in caplog.text
    assert "beside its class folders, and left out: loose.png" in caplog.text


def test_pictures_of_telephones_are_read(tmp_path):
    image = picture().convert("RGB")
    file = tmp_path / "0.heic"
    image.save(file, quality=-1, chroma=444)  # without loss, but for the conversion of colours
    found = np.asarray(upright_rgb(open_encoded(file.read_bytes())), dtype=int)
    assert np.abs(found - np.asarray(image)).max() <= 3
    assert is_image("0.HEIC")
    assert "pip install pillow-heif" in not_read({".heic": 25})  # said without the package, when is_image is false


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(encoded(picture()))
    with open(os.fsencode(tmp_path) + b"/dog/caf\xe9.png", "wb") as file:
        file.write(encoded(picture()))
    with pytest.raises(ValueError, match=r"caf\\udce9\.png' is not valid UTF-8; rename the file"):
        load_long_tailed(data_dir=str(tmp_path), test_fraction=0.5)


@pytest.mark.parametrize("background", [None, "#00ff00"])
def test_training_evaluation_and_serving_use_the_same_background(tmp_path, background):
    """Training, evaluation and serving use the same background; the processor stores it in the saved folder."""
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    rows = rows_of([{"bytes": encoded(image)}] * 8)
    trainer = FlatTeacherTrainer(
        model=FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=2)),
        args=FlatTeacherTrainingArguments(
            output_dir=str(tmp_path), warmup_epochs=0, per_device_train_batch_size=4, report_to=[], use_cpu=True
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=image_processor(8, mean=(0, 0, 0), std=(1, 1, 1), background=background),
    )
    colour = [200, 0, 0] if background is None else [0, 255, 0]
    assert trainer.train_dataset._image(0)[0, 0].tolist() == colour
    assert trainer.eval_dataset[0]["image"][0, 0].tolist() == colour
    trainer.save_model()
    shown = load_handler(str(tmp_path)).prepare(encoded(image), "image")
    assert shown[0, :, 0, 0].tolist() == pytest.approx([value / 255 for value in colour])


def test_pillow_does_not_warn_for_every_image():
    """Library users read images without the command line, whose filter they do not have."""
    code = "import warnings, deitlt_hf.data.images; warnings.warn_explicit('palette', UserWarning, 'x', 1, 'PIL.Image')"
    assert "palette" not in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
