"""Pictures in: every kind that a user may hold, sizes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from masa import MasaError
from masa.io.pictures import fitted_size, load_image, load_mask, to_pil


@pytest.fixture
def picture(generator):
    pixels = torch.randint(0, 256, (96, 160, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(pixels)


def test_every_kind_of_picture_means_the_same(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1
    kinds = (path, str(path), picture, array, tensor)
    loaded = [load_image(kind, short_side=64, height=64, width=128) for kind in kinds]
    for other in loaded[1:]:
        assert torch.equal(loaded[0], other)
    assert loaded[0].shape == (1, 3, 64, 128)


def test_a_picture_of_the_right_size_keeps_its_pixels(generator):
    pixels = torch.randint(0, 256, (64, 128, 3), generator=generator, dtype=torch.uint8).numpy()
    x = load_image(pixels, short_side=64)
    assert np.array_equal(np.asarray(to_pil(x)[0]), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("given", [{}, {"height": 128}, {"width": 64}])
def test_a_file_s_head_tells_the_size_that_it_is_fitted_to(tmp_path, orientation, given):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (100, 200)).save(tmp_path / "p.jpg", exif=exif)
    expected = load_image(tmp_path / "p.jpg", short_side=64, **given).shape[2:]
    assert fitted_size(tmp_path / "p.jpg", short_side=64, **given) == tuple(expected)
    (tmp_path / "p.jpg").write_bytes(b"no picture")
    with pytest.raises(MasaError, match=r"p\.jpg cannot be read as a picture"):
        fitted_size(tmp_path / "p.jpg", short_side=64)


@pytest.mark.parametrize(
    ("size", "short_side", "given", "expected"),
    [
        ((100, 200), 64, (None, None), (64, 128)),
        ((300, 200), 128, (None, None), (192, 128)),
        ((3000, 4000), 512, (None, None), (512, 640)),  # 682 wide, cropped to a multiple of 64
        ((100, 100), 512, (128, 256), (128, 256)),
        ((100, 200), 512, (128, None), (128, 256)),
        ((100, 200), 512, (None, 128), (64, 128)),
        ((98, 98), 512, (None, None), (512, 512)),  # 98 * (512 / 98) is a little less than 512
    ],
)
def test_sizes(size, short_side, given, expected):
    picture = Image.new("RGB", (size[1], size[0]))
    x = load_image(picture, short_side=short_side, height=given[0], width=given[1])
    assert tuple(x.shape[2:]) == expected


def test_scaling_covers_and_crops_the_middle():
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    x = load_image(picture, short_side=64, height=64, width=64)
    assert x.min() > 0.9  # only the white middle is left


def test_transparent_parts_become_white():
    x = load_image(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), short_side=64)
    assert x.min() == 1.0


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (128, 64))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", short_side=64).shape == (1, 3, 128, 64)


def test_palette_and_grey_pictures_open(tmp_path):
    Image.new("P", (64, 64)).save(tmp_path / "palette.png")
    Image.new("L", (64, 64), 128).save(tmp_path / "grey.png")
    for name in ("palette.png", "grey.png"):
        assert load_image(tmp_path / name, short_side=64).shape == (1, 3, 64, 64)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    x = load_image(tmp_path / "ramp.png", short_side=64)
    assert x.mean().abs() < 0.02
    assert x.max() == 1.0
    assert x.min() == -1.0


def test_transparent_parts_of_a_mask_are_outside(tmp_path):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").mean() == 0.5


def test_broken_and_huge_files_are_named(tmp_path, picture, monkeypatch):
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(MasaError, match=r"half\.jpg cannot be read"):
        load_image(tmp_path / "half.jpg", short_side=64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MasaError, match=r"whole\.jpg has more pixels"):
        load_image(tmp_path / "whole.jpg", short_side=64)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \(8, 8, 3\); expected uint8"),
        (torch.zeros(4, 64, 64), r"\(4, 64, 64\); expected float \(3, h, w\)"),
        (torch.full((3, 64, 64), 255.0), "values from 255 to 255"),
        (torch.full((3, 64, 64), float("nan")), "values from nan"),
        (7, "cannot be a int"),
    ],
)
def test_what_is_no_picture_is_named(image, message):
    with pytest.raises(MasaError, match=message):
        load_image(image, short_side=64)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(MasaError, match=r"text\.jpg is not a picture"):
        load_image(tmp_path / "text.jpg", short_side=64)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.jpg", short_side=64)
    with pytest.raises(MasaError, match="is a folder"):
        load_image(tmp_path, short_side=64)


@pytest.mark.parametrize("side", [0, 65, 63, -64, 64.0])
def test_sizes_must_be_multiples_of_64(side):
    with pytest.raises(MasaError, match=f"height is {side}"):
        load_image(Image.new("RGB", (64, 64)), short_side=64, height=side, width=64)


def test_masks_of_every_kind(tmp_path):
    expected = torch.zeros(4, 6)
    expected[1:3, 2:5] = 1.0
    picture = Image.fromarray((expected.numpy() * 255).astype(np.uint8))
    picture.save(tmp_path / "mask.png")
    tensors = (expected, expected.bool(), expected[None], expected.byte())  # bytes of 0 and 1 are no dark picture
    for kind in (*tensors, expected.numpy(), picture, tmp_path / "mask.png", np.asarray(picture)):
        assert torch.equal(load_mask(kind), expected)


def test_bad_masks_are_named():
    with pytest.raises(MasaError, match="expected \\(h, w\\)"):
        load_mask(torch.zeros(2, 4, 4))
    with pytest.raises(MasaError, match="values from 0 to 2"):
        load_mask(torch.tensor([[0.0, 2.0]]))
