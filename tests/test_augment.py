"""Tests of the RandAugment operations against timm's, and of the training transform against its `create_transform`."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, _RAND_TRANSFORMS, AugmentOp, RandAugment

from deitlt_hf.data import augment, image_processor, train_transform
from deitlt_hf.data.augment import FASTER, on_arrays
from helpers import seed_all

RANDOM = np.random.RandomState(0)
FILL = (124, 116, 104)


def images():
    """Test images: noise, a smooth gradient, a uniform image, and a wide image with few values."""
    smooth = Image.fromarray(RANDOM.randint(0, 256, (5, 7, 3)).astype(np.uint8)).resize((60, 43), Image.BICUBIC)
    return [
        Image.fromarray(RANDOM.randint(0, 256, (33, 32, 3)).astype(np.uint8)),
        smooth,
        Image.new("RGB", (24, 24), (7, 200, 255)),
        Image.fromarray((RANDOM.randint(0, 3, (9, 40, 3)) * 90).astype(np.uint8)),
    ]


def operations(names, resample, magnitude=9, **hparams):
    hparams = {"img_mean": FILL, "interpolation": resample, "magnitude_std": 0.5, **hparams}
    return [AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams) for name in names]


@pytest.mark.parametrize("resample", [Image.BICUBIC, Image.BILINEAR], ids=["bicubic", "bilinear"])
@pytest.mark.parametrize("name", sorted({*_RAND_INCREASING_TRANSFORMS, *_RAND_TRANSFORMS}))
@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
def test_operation_matches_timm(name, resample, large, monkeypatch):
    """Each operation gives timm's pixels.

    After bicubic movements, one value in 500 may differ by one grey level (float32).
    """
    timms, ours = operations([name], resample)[0], operations([name], resample)[0]
    on_arrays(RandAugment([ours]))
    monkeypatch.setattr(augment, "SMALL", 0 if large else 8192)
    different = total = 0
    for seed in range(12):
        for image in images():
            for operation in (timms, ours):
                random.seed(seed)
                try:
                    given = image if operation is timms else np.asarray(image)
                    result = np.asarray(operation(given)).astype(int)
                except ValueError:  # Pillow 13 fails when timm posterizes to 0 bits
                    assert operation is timms
                    result = np.zeros((image.height, image.width, 3), int)
                if operation is timms:
                    expected = result
            assert np.abs(result - expected).max() <= 1
            different += np.count_nonzero(result != expected)
            total += result.size
    moves = name.startswith(("Shear", "Translate")) and resample == Image.BICUBIC
    assert different <= (total / 500 if moves else 0)


@pytest.mark.parametrize("magnitude", [9, 10, 13, 20, 30])
@pytest.mark.parametrize("name", _RAND_INCREASING_TRANSFORMS)
def test_magnitudes_above_ten(name, magnitude):
    """Magnitudes above ten work, as in `rand-m20-mmax30-inc1`: posterize then keeps 0 bits and gives a black image."""
    operation = operations([name], Image.BICUBIC, magnitude, magnitude_std=0, magnitude_max=30)[0]
    on_arrays(RandAugment([operation]))
    result = operation(np.asarray(images()[0]))
    assert result.shape == (33, 32, 3)
    if name == "PosterizeIncreasing":
        assert result.any() == (magnitude == 9)


@pytest.mark.parametrize("share", [0.0, 0.25, -0.5, 1.0, -1.0])
def test_translation_by_whole_pixels_is_exact(share, monkeypatch):
    """Movements by whole pixels are exact: no value is rounded or one level too low."""
    monkeypatch.setattr(augment, "SMALL", 0)
    for image in images():
        for name in ("TranslateXRel", "TranslateYRel"):
            operation = operations([name], Image.BICUBIC)[0]
            expected = operation.aug_fn(image, share, fillcolor=FILL, resample=Image.BICUBIC)
            result = FASTER[name](np.asarray(image), share, fillcolor=FILL, resample=Image.BICUBIC)
            if (share * image.width).is_integer() and (share * image.height).is_integer():
                assert np.array_equal(result, expected)


def timm_transform(size, crop):
    from torchvision import transforms

    transform = create_transform(
        size,
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    if crop == "padded":
        resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
        transform.transforms[0] = transforms.Compose([resize, transforms.RandomCrop(size, padding=size // 8)])
    return transform


@pytest.mark.parametrize(
    ("image_size", "size", "crop"),
    [
        ((40, 40), 32, "random_resized"),
        ((32, 32), 32, "padded"),
        ((60, 43), 32, "padded"),
        ((90, 70), 48, "random_resized"),
    ],
)
def test_transform_matches_timm_for_the_same_draws(image_size, size, crop, monkeypatch):
    """With the same draws, crop, flip, operations and erased area are timm's; grey levels differ by rounding.

    The test compares the mean, because an operation such as solarizing can turn a difference of one level into a large
    one.
    """
    ours, timms = train_transform(image_processor(size), crop), timm_transform(size, crop)
    image = Image.fromarray(RANDOM.randint(0, 256, (6, 8, 3)).astype(np.uint8)).resize(image_size, Image.BICUBIC)
    resizes = image_size != (size, size)
    if size == 48:
        monkeypatch.setattr(augment, "SMALL", 0)
    compared = 0
    for seed in range(80):
        seed_all(seed)
        result = ours.finish(ours(image)[None])[0]
        seed_all(seed)
        try:
            expected = timms(image)
        except ValueError:
            continue
        compared += 1
        levels = (result - expected).abs() * 0.225 * 255
        if resizes:
            assert levels.mean() < 1
            assert levels.median() < 1.2
        else:
            assert levels.max() < 1.2
            assert (levels > 0.01).float().mean() < 0.01
    assert compared > 55


def test_memory_of_a_batch_in_use_is_not_reused():
    """The memory of a batch is reused for the next one only when nobody holds it any more."""
    transform = train_transform(image_processor(16), random_erasing=0)
    pixels = [torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8) for _ in range(3)]
    first = transform.finish(pixels[0])
    kept, copy = first[1:, 0], first[1:, 0].clone()
    address = first.data_ptr()
    del first
    second = transform.finish(pixels[1])
    assert second.data_ptr() != address
    assert torch.equal(kept, copy)
    address = second.data_ptr()
    del second
    assert transform.finish(pixels[2]).data_ptr() == address
