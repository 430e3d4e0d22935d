"""Decoding of every kind of picture, resizing against Pillow, augmentation against its formulas."""

import contextlib
import io
import itertools
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageEnhance, ImageOps

from flip_jax.data import transforms
from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.transforms import decode_image, load_image, prepare_image, resize_image


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture, no two corners alike; survives JPEG nearly unchanged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "a camera"  # an entry before the one that counts
    exif[0x0112] = orientation
    return exif


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * np.log10(255**2 / error)


def test_imports_no_jax():
    code = "import sys, flip_jax.data.transforms; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_decode_jpeg_is_close_to_what_was_encoded():
    image = picture(50, 40)
    data = transforms.encode_jpeg(image)
    assert decode_image(data).shape == (50, 40, 3)
    assert decode_image(data).flags.c_contiguous
    assert psnr(decode_image(data), image) > 40
    assert jpeg_size(data) == (50, 40)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_of_many_scans_is_not_decoded(mode):
    """Each goes over all pixels: 100 KB of them would take seconds, 8 MB minutes."""
    file = io.BytesIO()
    Image.fromarray(picture(50, 40)).convert(mode).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert decode_image(data).shape == (50, 40, 3)
    end = data.rindex(b"\xff\xd9")
    last = data[data.rindex(b"\xff\xda") : end]
    with pytest.raises(BadImage, match=r"1\d\d scans; at most 100"):
        decode_image(data[:end] + 100 * last + data[end:])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_decode_jpeg_modes_match_pillow(mode):
    data = encode(Image.fromarray(picture(31, 47)).convert(mode), quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 2
    assert jpeg_size(data) == (31, 47)


def test_grey_jpeg_has_three_equal_channels():
    image = decode_image(encode(Image.fromarray(picture(20, 20)).convert("L")))
    assert (image[..., :1] == image).all()


def test_a_picture_that_no_jpeg_can_be_is_named():
    with pytest.raises(BadImage, match=r"70000 x 2 pixels cannot be a JPEG: .*65500"):
        prepare_image(encode(Image.new("RGB", (70_000, 2)), "PNG"), None, 95)


def test_fill_bytes_before_a_marker():
    data = encode(Image.fromarray(picture(30, 50)), quality=95, exif=turned(6))
    place = data.index(b"\xff\xe1")
    filled = data[:place] + b"\xff\xff" + data[place:]
    np.testing.assert_array_equal(decode_image(filled), decode_image(data))
    assert jpeg_size(filled) == jpeg_size(data) == (50, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    data = encode(Image.fromarray(picture(30, 50)), quality=95, exif=turned(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert jpeg_size(data) == expected.shape[:2]
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 2


def test_big_endian_and_broken_exif():
    plain = encode(Image.fromarray(picture(30, 50)))

    def with_exif(tiff: bytes) -> bytes:
        body = b"Exif\0\0" + tiff
        return plain[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + plain[2:]

    entry = bytes.fromhex("0112 0003 00000001 0006 0000")
    assert jpeg_size(with_exif(b"MM\0\x2a\0\0\0\x08\0\x01" + entry + bytes(4))) == (50, 30)
    for broken in (b"", b"MM", b"XX\0\x2a\0\0\0\x08", b"II\x2a\0\xff\xff\xff\xff"):
        assert jpeg_size(with_exif(broken)) == (30, 50)
        assert decode_image(with_exif(broken)).shape == (30, 50, 3)
        assert transforms.prepare_image(with_exif(broken), None, 95)[1] is False


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGB", "WEBP"), ("P", "GIF")],
)
def test_other_formats_are_accepted(mode, file_format):
    data = encode(Image.fromarray(picture(24, 18)).convert(mode), file_format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)
    with pytest.raises(BadImage):
        jpeg_size(data)


@pytest.mark.parametrize(
    ("dtype", "file_format"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.float32, "TIFF")]
)
def test_pixels_of_more_than_8_bits_are_refused(dtype, file_format):
    grey = Image.fromarray(np.linspace(0, 1000, 64, dtype=dtype).reshape(8, 8))
    with pytest.raises(BadImage, match="8 bits per channel"):
        decode_image(encode(grey, file_format))
    with pytest.raises(BadImage, match=f"mode {grey.mode}"):
        transforms.rgb_array(grey)


def test_rgb_array_is_upright():
    image = Image.fromarray(picture(30, 50))
    image.getexif()[0x0112] = 6
    np.testing.assert_array_equal(
        transforms.rgb_array(image), np.rot90(picture(30, 50), axes=(1, 0))
    )


@pytest.mark.parametrize("file_format", ["EPS", "TGA"])
def test_formats_outside_the_list_are_refused(file_format):
    data = encode(Image.fromarray(picture(16, 16)), file_format)
    with pytest.raises(BadImage, match="not a picture of JPEG"):
        decode_image(data)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_bad_bytes_raise_bad_image(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), file_format)
    for data in (b"", b"not a picture", whole[:30], whole[: len(whole) // 2], whole[:-200]):
        with pytest.raises(BadImage):
            decode_image(data)


def test_flipped_bytes_in_a_jpeg_never_crash():
    whole = bytearray(encode(Image.fromarray(picture(64, 64))))
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for position in rng.integers(2, len(data), 5):
            data[position] ^= int(rng.integers(1, 256))
        with contextlib.suppress(BadImage):
            assert decode_image(bytes(data)).ndim == 3


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_header_that_claims_too_many_pixels_is_refused(file_format):
    data = bytearray(encode(Image.fromarray(picture(16, 16)), file_format))
    if file_format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = (16_384).to_bytes(2, "big") * 2
    else:
        data[16:24] = (16_384).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    for read in (jpeg_size, decode_image) if file_format == "JPEG" else (decode_image,):
        with pytest.raises(BadImage, match="pixels"):
            read(bytes(data))


@pytest.mark.parametrize(
    ("height", "width", "least_db"),
    [(218, 178, 44), (100, 80, 44), (512, 512, 90), (256, 209, 90), (60, 400, 90)],
)
def test_resize_matches_pillow(height, width, least_db):
    image = picture(height, width)
    noisy = np.random.default_rng(1).integers(-9, 10, image.shape)
    image = np.clip(image + cv2.blur(noisy.astype(np.float32), (3, 3)), 0, 255).astype(np.uint8)
    expected = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    out = resize_image(image, 224)
    assert out.shape == (224, 224, 3) and out.dtype == np.uint8
    assert psnr(out, np.asarray(expected) + 1e-9) > least_db


def test_resize_antialiases():
    stripes = np.zeros((448, 448, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resize_image(stripes, 56)[4:-4, 4:-4].astype(int)) <= 2


def test_resize_to_the_same_size_changes_nothing():
    image = picture(64, 64)
    np.testing.assert_array_equal(resize_image(image, 64), image)


@pytest.mark.parametrize(
    ("height", "width"), [(218, 178), (239, 230), (256, 256), (300, 420), (512, 512), (1205, 930)]
)
def test_load_is_near_the_exact_resize(height, width):
    """Growing, shrinking a little and much, and with what libjpeg leaves out at 1/2 and 1/4."""
    data = encode(Image.fromarray(picture(height, width)), quality=90)
    exact = np.asarray(Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC))
    out = load_image(data, 224)
    assert out.shape == (224, 224, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    assert psnr(out, exact) > 45


@pytest.mark.parametrize(("side", "least_db"), [(336, 41), (672, 46)])
def test_load_averages_where_much_is_left_to_shrink(side, least_db):
    """By 1.5, of all of the file or of half; plain cubic sampling is at 33 and 43 dB."""
    rng = np.random.default_rng(1)
    noise = cv2.GaussianBlur(
        rng.normal(size=(side, side, 3)).astype(np.float32), (0, 0), side / 560
    )
    image = np.clip(picture(side, side) + 40 * noise, 0, 255).astype(np.uint8)
    data = encode(Image.fromarray(image), quality=98, subsampling=0)
    exact = np.asarray(Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC))
    assert psnr(load_image(data, 224), exact) > least_db


def test_load_is_exact_where_one_side_shrinks_and_one_grows():
    data = transforms.encode_jpeg(picture(300, 200))
    np.testing.assert_array_equal(load_image(data, 224), resize_image(decode_image(data), 224))


@pytest.mark.parametrize("side", [128, 512])
def test_load_antialiases(side):
    stripes = np.zeros((side, side, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(load_image(transforms.encode_jpeg(stripes), 56)[4:-4, 4:-4].astype(int)) <= 2


@pytest.mark.parametrize(
    ("least", "shape"),
    [(None, (401, 300)), (151, (401, 300)), (150, (201, 150)), (75, (101, 75)), (1, (51, 38))],
)
def test_jpeg_decoded_at_a_part_of_its_size(least, shape):
    """No side is shorter than asked for, and the picture is the same one, turned as it should."""
    image = picture(401, 300)
    data = encode(Image.fromarray(image), quality=95)
    out = decode_image(data, least)
    assert out.shape == (*shape, 3)
    small = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    assert psnr(out, small + 1e-9) > 33  # at 1/8 the last blocks reach beyond the picture
    data = encode(Image.fromarray(image), quality=95, exif=turned(6))
    upright = cv2.rotate(out, cv2.ROTATE_90_CLOCKWISE)
    np.testing.assert_array_equal(decode_image(data, least), upright)


def test_damage_is_found_at_a_part_of_the_size():
    data = encode(Image.fromarray(picture(401, 300)), quality=95)
    with pytest.raises(BadImage, match="damaged JPEG"):
        decode_image(data[: len(data) // 2], 40)


def test_flip_mirrors_half_of_the_time():
    image, rng = picture(20, 31), np.random.default_rng(0)
    flips = 0
    for _ in range(200):
        out = transforms.random_flip(image, rng)
        flipped = not np.array_equal(out, image)
        np.testing.assert_array_equal(out, image[:, ::-1] if flipped else image)
        flips += flipped
    assert 70 < flips < 130


@pytest.mark.parametrize("seed", range(5))
def test_equalize_equals_pillow(seed):
    image = picture(40 + seed, 33, seed) // (seed + 1)
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    np.testing.assert_array_equal(transforms.equalize(image), expected)


def test_equalize_keeps_a_constant_picture():
    image = np.full((30, 30, 3), 77, np.uint8)
    np.testing.assert_array_equal(transforms.equalize(image), image)


@pytest.mark.parametrize("factor", [0.1, 0.64, 1.0, 1.9])
def test_brightness_and_sharpness_match_pillow(factor):
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    for ours, theirs in (
        (transforms.brightness, ImageEnhance.Brightness),
        (transforms.sharpness, ImageEnhance.Sharpness),
    ):
        expected = np.asarray(theirs(Image.fromarray(image)).enhance(factor)).astype(int)
        assert np.abs(ours(image, factor).astype(int) - expected).max() <= 1


class Draws:
    """Stands in for a Generator: hands out given numbers, so that one operation is certain."""

    def __init__(self, name: str, sign: float):
        self.name, self.numbers = name, [0.0, sign]

    def integers(self, high, size):
        return np.array([transforms.AUGMENT_OPS.index(self.name)])

    def random(self):
        return self.numbers.pop(0)


def augment(image: np.ndarray, name: str, sign: float, level: int = 5) -> np.ndarray:
    return transforms.rand_augment(image, Draws(name, sign), ops=1, level=level)


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_no_ops_of_level_5(name):
    image = picture(32, 32)
    np.testing.assert_array_equal(augment(image, name, 0.0), image)


@pytest.mark.parametrize(("sign", "shift"), [(0.2, -5), (0.8, 5)])
def test_translate_moves_5_px_and_fills_grey(sign, shift):
    image = picture(40, 40)
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        out = np.swapaxes(augment(image, name, sign), 0, axis)
        source = np.swapaxes(image, 0, axis)
        if shift > 0:
            np.testing.assert_array_equal(out[5:], source[:-5])
            assert (out[:5] == 128).all()
        else:
            np.testing.assert_array_equal(out[:-5], source[5:])
            assert (out[-5:] == 128).all()


@pytest.mark.parametrize("shape", [(40, 30), (7, 4)])
def test_translate_is_what_opencv_makes_of_it(shape):
    image = picture(*shape)
    for right, down in itertools.product(range(-10, 11, 3), repeat=2):
        matrix = np.array([[1, 0, right], [0, 1, down]], np.float32)
        expected = cv2.warpAffine(image, matrix, shape[::-1], borderValue=(128, 128, 128))
        np.testing.assert_array_equal(transforms._translate(image, right, down), expected)


@pytest.mark.parametrize(("sign", "shear"), [(0.2, 0.15), (0.8, -0.15)])
def test_shear_is_anchored_top_left(sign, shear):
    image = picture(100, 100)
    for name, axes in (("ShearX", (0, 1)), ("ShearY", (1, 0))):
        out = np.moveaxis(augment(image, name, sign), axes, (0, 1))
        source = np.moveaxis(image, axes, (0, 1))
        np.testing.assert_array_equal(out[0], source[0])
        for row in (20, 40, 80):  # whole-pixel shifts of shear * row
            moved = np.roll(source[row], round(shear * row), axis=0)
            inner = slice(15, -15)
            assert np.abs(out[row][inner].astype(int) - moved[inner]).max() <= 1


@pytest.mark.parametrize(("sign", "degrees"), [(0.2, -15), (0.8, 15)])
def test_rotate_matches_pillow(sign, degrees):
    image = picture(90, 90)
    # OpenCV turns about the pixel at (W/2, H/2), Pillow about the corner between pixels.
    expected = Image.fromarray(image).rotate(
        degrees, Image.Resampling.BILINEAR, center=(45.5, 45.5), fillcolor=(128, 128, 128)
    )
    out = augment(image, "Rotate", sign)[25:-25, 25:-25].astype(int)
    assert np.abs(out - np.asarray(expected)[25:-25, 25:-25]).max() <= 3
    assert (augment(image, "Rotate", sign)[0, 0] == 128).all()


def test_augment_uses_all_ops_at_the_right_rates():
    image = picture(24, 24)
    rng = np.random.default_rng(0)
    unchanged = sum(np.array_equal(transforms.rand_augment(image, rng), image) for _ in range(1200))
    # An op changes the picture with p = 1/2 * 6/9, so two leave it alone with p = 4/9.
    assert abs(unchanged / 1200 - 4 / 9) < 0.05


def test_augment_is_a_function_of_the_generator():
    image = picture(24, 24)
    for seed in range(20):
        first = transforms.rand_augment(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(
            first, transforms.rand_augment(image, np.random.default_rng(seed))
        )
    assert transforms.rand_augment(image, np.random.default_rng(0), ops=0) is image


@pytest.mark.parametrize(("ops", "level"), [(-1, 5), (2, -1), (2, 11)])
def test_augment_refuses_bad_settings(ops, level):
    with pytest.raises(ValueError, match="rand_augment"):
        transforms.rand_augment(picture(8, 8), np.random.default_rng(0), ops, level)


def test_encode_jpeg_keeps_full_chroma():
    assert simplejpeg.decode_jpeg_header(transforms.encode_jpeg(picture(16, 16)))[3] == "444"


def test_contain_keeps_a_pixel():
    picture = Image.fromarray(np.zeros((2, 60_000, 3), np.uint8))
    assert transforms.contain(picture, 192).size == (192, 1)
    assert transforms.contain(picture.rotate(90, expand=True), 192).size == (1, 192)
    assert transforms.contain(Image.new("RGB", (30, 20)), 192).size == (192, 128)
