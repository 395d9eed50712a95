"""What is written is what every reader sees: each kind of picture, and with either compressor."""

from __future__ import annotations

import zlib
from typing import Any

import cv2
import numpy as np
import pytest

from appliance import _png

RNG = np.random.default_rng(0)
SHAPES = [(1, 1), (1, 7), (5, 1), (40, 33)]


def pixels_of(png: bytes) -> Any:
    out = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert out is not None
    return out


@pytest.fixture(params=["ISA-L", "zlib"])
def compressor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(_png, "deflate", zlib)


@pytest.mark.usefixtures("compressor")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_grey_and_colour_are_read_as_they_were(shape: tuple[int, int], channels: tuple[int, ...]) -> None:
    image = RNG.integers(0, 256, (*shape, *channels)).astype(np.uint8)
    assert np.array_equal(pixels_of(_png.encode(image)), image)


@pytest.mark.usefixtures("compressor")
@pytest.mark.parametrize("shape", SHAPES)
def test_indices_are_read_as_the_colours_and_the_alpha_of_the_palette(shape: tuple[int, int]) -> None:
    palette = RNG.integers(0, 256, (256, 4)).astype(np.uint8)
    image = RNG.integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(pixels_of(_png.encode(image, palette)), palette[image])


def test_a_part_of_an_array_is_written_as_such() -> None:
    image = RNG.integers(0, 256, (30, 40, 3)).astype(np.uint8)
    assert np.array_equal(pixels_of(_png.encode(image[3:20, 5:31])), image[3:20, 5:31])
    assert np.array_equal(pixels_of(_png.encode(image[::2, :, 1])), image[::2, :, 1])


def test_words_stand_before_the_pixels_and_stay_within_latin_1() -> None:
    png = _png.encode(np.zeros((4, 4), np.uint8), text=("Comment", "5 µm → far"))
    assert "Comment\0 5 µm ? far".replace("\0 ", "\0").encode("latin-1") in png
    assert png.index(b"tEXt") < png.index(b"IDAT")
    assert b"tEXt" not in _png.encode(np.zeros((4, 4), np.uint8))


def test_a_flat_picture_is_small() -> None:
    assert len(_png.encode(np.full((1000, 1000, 3), 77, np.uint8))) < 20_000
