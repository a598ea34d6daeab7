"""Images of every kind that people have: read as they look, or refused in a sentence that says why."""

import io
import re
import struct
import sys
import types
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFile, features

from osv_jax.data.image import read_image
from osv_jax.errors import UserError

H, W = 16, 24
RAMP = np.tile(np.linspace(0, 1, W), (H, 1))
# The same in 8 and 16 bits; no value is its mirror image's.
GREY, GREY16 = (RAMP**2 * 255).round().astype(np.uint8), (RAMP**2 * 65535).round().astype(np.uint16)
RGB = np.stack([GREY, (RAMP[:, ::-1] * 200).astype(np.uint8), np.full((H, W), 128, np.uint8)], axis=-1)
SHORT, LONG, RATIONAL, DOUBLE = 3, 4, 5, 12


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(values, color, extra=b""):
    """A PNG of 16 bits, as Pillow writes none but grey ones."""
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def directory(entries, start=8, order="<"):
    """A TIFF header and one directory of `(tag, type, values)`, `start` bytes into the file."""
    names = {1: "B", 2: "B", SHORT: "H", LONG: "I", RATIONAL: "I", 10: "i", DOUBLE: "d"}
    table, behind = b"", b""
    for tag, kind, values in entries:
        data = struct.pack(f"{order}{len(values)}{names[kind]}", *values)
        offset = start + 2 + 12 * len(entries) + 4 + len(behind)
        if len(data) > 4:
            data, behind = struct.pack(order + "I", offset), behind + data
        count = len(values) // 2 if kind in (RATIONAL, 10) else len(values)
        table += struct.pack(order + "HHI", tag, kind, count) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + struct.pack(order + "H", len(entries)) + table + bytes(4) + behind


def tiff(data, bits, photometric=1, kind=1, order="<", more=()):
    """An uncompressed TIFF of grey or RGB, for what Pillow does not write."""
    samples = (bits,) if isinstance(bits, int) else bits

    def head(offset):
        tags = [(256, LONG, (W,)), (257, LONG, (H,)), (258, SHORT, samples), (259, SHORT, (1,))]
        tags += [(262, SHORT, (photometric,)), (273, LONG, (offset,)), (277, SHORT, (len(samples),))]
        tags += [(278, LONG, (H,)), (279, LONG, (len(data),)), (339, SHORT, (kind,) * len(samples))]
        return directory(sorted([*tags, *more]), order=order)

    return head(len(head(0))) + data


def twelve_bits():
    first, second = (RAMP**2 * 4095).round().astype(int).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()


def jpeg(exif):
    """A JPEG of `RGB` with this EXIF block."""
    whole = saved(Image.fromarray(RGB), "JPEG")
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:]


ROTATED = (0x0112, SHORT, (6,))
PICTURE, GREY_PICTURE = Image.fromarray(RGB), Image.fromarray(GREY)
# What a file holds, what it looks like, and how close its format comes to that.
FILES = {
    "png": (saved(PICTURE, "PNG"), RGB, 0),
    "png, palette": (saved(PICTURE.quantize(64), "PNG"), RGB, 16),
    "png, 1 bit": (saved(Image.fromarray(GREY > 99), "PNG"), 255 * np.uint8(GREY > 99), 0),
    "png, grey 16 bits": (saved(Image.fromarray(GREY16), "PNG"), GREY, 0),
    "png, RGB 16 bits": (png(RGB * np.uint16(257), 2), RGB, 0),
    "tiff, grey 16 bits": (saved(Image.fromarray(GREY16), "TIFF"), GREY, 0),
    "tiff, grey 16 bits, compressed": (saved(Image.fromarray(GREY16), "TIFF", compression="tiff_lzw"), GREY, 0),
    "tiff, grey 16 bits, big-endian": (tiff(GREY16.astype(">u2").tobytes(), 16, order=">"), GREY, 0),
    "tiff, grey 16 bits, white is 0": (tiff((65535 - GREY16).tobytes(), 16, photometric=0), GREY, 1),
    "tiff, grey 12 bits": (tiff(twelve_bits(), 12), GREY, 1),
    "tiff, grey 8 bits, white is 0": (tiff((255 - GREY).tobytes(), 8, photometric=0), GREY, 0),
    "tiff, RGB 16 bits": (tiff((RGB * np.uint16(257)).tobytes(), (16, 16, 16), photometric=2), RGB, 0),
    "tiff, float": (saved(Image.fromarray(np.float32(RAMP**2)), "TIFF"), GREY, 1),
    "tiff, float, white is 0": (tiff(np.float32(1 - RAMP**2).tobytes(), 32, photometric=0, kind=3), GREY, 1),
    "tiff, CMYK": (saved(PICTURE.convert("CMYK"), "TIFF"), RGB, 1),
    "tiff, LAB": (saved(GREY_PICTURE.convert("RGB").convert("LAB"), "TIFF"), GREY, 6),
    "pgm, 16 bits": (saved(Image.fromarray(GREY16), "PPM"), GREY, 0),
    "pgm, up to 1000": (b"P5 24 16 1000 " + (RAMP**2 * 1000).round().astype(">u2").tobytes(), GREY, 1),
    "jpeg": (saved(PICTURE, "JPEG", quality=95, subsampling=0), RGB, 12),
    "jpeg, CMYK": (saved(PICTURE.convert("CMYK"), "JPEG", quality=95), RGB, 12),
    "jpeg, two pictures": (
        saved(PICTURE, "MPO", save_all=True, append_images=[GREY_PICTURE.rotate(180)], quality=95, subsampling=0),
        RGB,
        12,
    ),
    "jpeg 2000, 16 bits": (saved(Image.fromarray(GREY16), "JPEG2000"), GREY, 0),
    "bmp": (saved(PICTURE, "BMP"), RGB, 0),
    "webp": (saved(PICTURE, "WEBP", lossless=True), RGB, 0),
    "avif": (saved(PICTURE, "AVIF", quality=100, subsampling="4:4:4"), RGB, 12),
}


@pytest.mark.parametrize(("data", "expected", "tolerance"), FILES.values(), ids=FILES)
def test_a_file_is_read_as_it_looks(data, expected, tolerance, tmp_path):
    (tmp_path / "image").write_bytes(data)
    actual = read_image(tmp_path / "image")
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=-1)
    assert actual.shape == expected.shape and actual.dtype == np.uint8
    assert np.abs(actual.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_a_picture_of_any_mode_looks_the_same(mode):
    picture = GREY_PICTURE.convert({"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode)
    assert np.abs(read_image(picture).astype(int) - GREY[..., None]).max() <= 6


def transparent_files():
    """Pictures whose right half is transparent and hides a colour there, and what they show."""
    alpha = np.uint8(255 * (np.arange(W) < W // 2) * np.ones((H, 1)))
    rgb = np.where(alpha[..., None] > 0, np.uint8([10, 20, 30]), np.uint8([200, 0, 0]))
    grey = np.where(alpha > 0, np.uint8(10), np.uint8(77))
    half = np.uint8(alpha > 0)
    palette = Image.fromarray(half).convert("P")
    palette.putpalette([200, 0, 0, 10, 20, 30])
    key16 = chunk(b"tRNS", struct.pack(">H", 77 * 257))
    in_color, in_grey = (np.where(alpha[..., None] > 0, np.uint8(color), 255) for color in ([10, 20, 30], [10] * 3))
    return {
        "png, RGBA": (saved(Image.fromarray(np.dstack([rgb, alpha])), "PNG"), in_color),
        "png, RGBA 16 bits": (png(np.dstack([rgb, alpha]) * np.uint16(257), 6), in_color),
        "webp": (saved(Image.fromarray(np.dstack([rgb, alpha])), "WEBP", lossless=True), in_color),
        "png, grey and alpha": (saved(Image.fromarray(np.dstack([grey, alpha])), "PNG"), in_grey),
        "png, RGB with a key": (saved(Image.fromarray(rgb), "PNG", transparency=(200, 0, 0)), in_color),
        "png, grey with a key": (saved(Image.fromarray(grey), "PNG", transparency=77), in_grey),
        "png, grey 16 bits with a key": (png(grey * np.uint16(257), 0, key16), in_grey),
        "png, palette with an index": (saved(palette, "PNG", transparency=0), in_color),
        "png, palette with alphas": (saved(palette, "PNG", transparency=b"\0\xff"), in_color),
        "gif": (saved(palette, "GIF", transparency=0), in_color),
    }


@pytest.mark.parametrize("name", transparent_files())
def test_what_is_transparent_lies_on_white(name, tmp_path):
    data, expected = transparent_files()[name]
    (tmp_path / "image").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "image"), expected)


def test_half_transparent_is_half_white():
    rgba = np.full((2, 2, 4), 100, np.uint8)
    rgba[..., 3] = 51
    np.testing.assert_array_equal(read_image(rgba), np.full((2, 2, 3), 255 - 0.2 * 155))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(format, tmp_path):
    colors = [Image.new("RGB", (W, H), color) for color in ("red", "lime", "blue")]
    (tmp_path / "image").write_bytes(saved(colors[0], format, save_all=True, append_images=colors[1:]))
    actual = read_image(tmp_path / "image").astype(int)
    assert np.abs(actual - [255, 0, 0]).max() <= 6


# The picture turned as each value of Orientation asks for.
TURNED = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.transpose(1, 0, 2),
    6: np.rot90(RGB, -1),
    7: RGB[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(RGB),
    99: RGB,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_cameras_rotation_marks_are_heeded(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        PICTURE.save(tmp_path / "image", format, exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "image"), TURNED[orientation])
    if orientation == 6:
        with Image.open(tmp_path / "image") as opened:
            np.testing.assert_array_equal(read_image(opened), TURNED[6])


# What crashed Pillow's writing of EXIF, or its reading, beside a rotation that is whole.
ODD_EXIF = {
    "a rational 1 / 0": (0x011A, RATIONAL, (1, 0)),
    "a signed rational -1 / 0": (0x011A, 10, (-1, 0)),
    "a rational too large": (0x011A, RATIONAL, (2**32 - 1, 1)),
    "a directory beyond the end": (0x8769, LONG, (99999,)),
    "a directory within itself": (0x8769, LONG, (8,)),
    "a directory of letters": (0x8769, 2, (97, 98, 99, 0)),
    "a position beyond the end": (0x8825, LONG, (99999,)),
    "a width of letters": (0x0100, 2, (97, 98, 99, 0)),
    "a number where text belongs": (0x010F, SHORT, (7,)),
    "text that is none": (0x010F, 2, (255, 254, 253, 0)),
    "NaN": (0x011A, DOUBLE, (float("nan"),)),
    "infinity": (0x011A, DOUBLE, (float("inf"),)),
}


@pytest.mark.parametrize("entry", ODD_EXIF.values(), ids=ODD_EXIF)
def test_odd_exif_beside_a_rotation_is_left_alone(entry, tmp_path):
    (tmp_path / "image").write_bytes(jpeg(b"Exif\0\0" + directory(sorted([ROTATED, entry]))))
    assert read_image(tmp_path / "image").shape == (W, H, 3)


@pytest.mark.parametrize("entry", [(0x011A, RATIONAL, (1, 0)), (0x8825, LONG, (99999,)), (0x8769, LONG, (99999,))])
def test_so_are_odd_tags_of_a_tiff(entry, tmp_path):
    (tmp_path / "image").write_bytes(tiff(RGB.tobytes(), (8, 8, 8), photometric=2, more=[ROTATED, entry]))
    np.testing.assert_array_equal(read_image(tmp_path / "image"), TURNED[6])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0" + bytes(range(64)), b"Exif\0\0" + directory([ROTATED])[:14], b"Exif\0\0MM\0*\xff"]
)
def test_exif_that_is_damaged_asks_for_nothing(exif, tmp_path):
    (tmp_path / "image").write_bytes(jpeg(exif))
    assert read_image(tmp_path / "image").shape == (H, W, 3)


def refusal(image):
    """The sentence with which an image is refused."""
    with pytest.raises(UserError) as error:
        read_image(image)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_an_image_of_too_many_pixels_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 0, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT") + chunk(b"IEND"))
    assert re.search(r"huge\.png has more than 178,956,970 pixels: scale it down", refusal(tmp_path / "huge.png"))


def test_a_large_image_is_read_without_a_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)
    PICTURE.save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        np.testing.assert_array_equal(read_image(tmp_path / "large.png"), RGB)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (Image.fromarray(np.int32(GREY16)), "signed integers, whose white is unknown"),
        (Image.fromarray(np.float32(GREY)), "has floats from 0 to 255: scale them to 0"),
        (Image.fromarray(np.float32(RAMP) - 0.5), "has floats from -0.5 to 0.5"),
        (Image.fromarray(np.full((H, W), np.nan, np.float32)), "has floats from nan to nan"),
    ],
)
def test_values_whose_white_is_unknown_are_refused(picture, words, tmp_path):
    picture.save(tmp_path / "image.tif")
    for image in (picture, tmp_path / "image.tif"):
        assert words in refusal(image)


def box(*brands):
    return struct.pack(">I", 8 + 4 * len(brands)) + b"ftyp" + b"".join(brands) + bytes(100)


@pytest.mark.parametrize("brands", [(b"heic", bytes(4), b"mif1"), (b"mif1", bytes(4), b"heic"), (b"msf1", bytes(4))])
def test_heic_names_the_package_that_reads_it(brands, tmp_path, monkeypatch):
    (tmp_path / "photo.heic").write_bytes(box(*brands))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "photo.heic is a HEIC image" in (sentence := refusal(tmp_path / "photo.heic"))
    assert "`pip install pillow-heif`" in sentence


def test_heic_is_read_once_that_package_is_there(tmp_path, monkeypatch):
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size = "RGB", (W, H)
            self.tile = [("raw", (0, 0, W, H), 120, "RGB")]

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    package = types.SimpleNamespace(register_heif_opener=lambda: Image.OPEN.update(HEIF=(Heif, None)))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    (tmp_path / "photo.heic").write_bytes(box(b"heic", bytes(4), b"mif1") + RGB.tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "photo.heic"), RGB)


def test_avif_names_the_pillow_that_reads_it(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "photo.avif")
    monkeypatch.setattr(features, "check", lambda feature: False)
    assert re.search(r"photo\.avif is an AVIF.*`pip install --upgrade pillow`", refusal(tmp_path / "photo.avif"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "AVIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("rest", [0.95, 0.5])
def test_a_cut_file_is_refused(format, rest, tmp_path):
    whole = saved(Image.effect_noise((W, H), 90).convert("RGB"), format)
    (tmp_path / "cut.png").write_bytes(whole[: int(rest * len(whole))])
    assert "cut.png cannot be read as an image (" in refusal(tmp_path / "cut.png")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        b"\x89PNG\r\n\x1a\n",
        b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ",  # macOS's `._cat.png`
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # for which Pillow would run another program
    ],
)
def test_what_is_no_image_is_refused(data, tmp_path):
    (tmp_path / "._cat.png").write_bytes(data)
    assert "._cat.png cannot be read as an image (damaged, or of a kind" in refusal(tmp_path / "._cat.png")


def test_names_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is no file: give an image file" in refusal(tmp_path / "folder.png")
    assert "nothing.png does not exist: give an image file" in refusal(str(tmp_path / "nothing.png"))
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert "embedded null" in refusal("a\0b")


def test_whatever_a_decoder_raises_is_one_sentence(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "image.png")
    for error in (ZeroDivisionError("of\ntwo lines"), MemoryError(), struct.error("x"), RecursionError("deep")):
        monkeypatch.setattr(Image.Image, "load", lambda self, error=error: exec("raise error", {"error": error}))
        assert "image.png cannot be read as an image (" in refusal(tmp_path / "image.png")


COLOR = np.float32(RGB / 255)
# Values of every kind that stands for `RGB`, or for `GREY`.
VALUES = {
    "uint8": (RGB, RGB),
    "uint16": (RGB * np.uint16(257), RGB),
    "uint16, big-endian": ((RGB * np.uint16(257)).astype(">u2"), RGB),
    "float32": (COLOR, RGB),
    "float64": (RGB / 255, RGB),
    "float16": (COLOR.astype(np.float16), RGB),
    "jax": (jnp.asarray(COLOR), RGB),
    "not contiguous": (np.asfortranarray(RGB)[:, ::-1], RGB[:, ::-1]),
    "grey": (GREY, GREY),
    "grey, one channel": (GREY[..., None], GREY),
    "grey, float": (GREY / 255, GREY),
    "bool": (GREY > 99, 255 * np.uint8(GREY > 99)),
    "RGBA, opaque": (np.dstack([RGB, np.full_like(GREY, 255)]), RGB),
    "RGBA, transparent": (np.dstack([RGB, np.zeros_like(GREY)]), np.full_like(RGB, 255)),
    "RGBA, float": (np.dstack([COLOR, np.ones((H, W), np.float32)]), RGB),
    "grey and alpha": (np.dstack([GREY, np.full_like(GREY, 255)]), GREY),
    "one pixel": (RGB[:1, :1], RGB[:1, :1]),
}


@pytest.mark.parametrize(("values", "expected"), VALUES.values(), ids=VALUES)
def test_arrays_of_every_kind(values, expected):
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=-1)
    np.testing.assert_array_equal(read_image(values), expected)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (RGB.transpose(2, 0, 1), "shape (3, 16, 24) and dtype uint8, does not have the shape [height, width"),
        (RGB[None], "shape (1, 16, 24, 3)"),
        (RGB[0, :, 0], "shape (24,)"),
        (np.zeros((0, 5, 3), np.uint8), "shape (0, 5, 3)"),
        (np.zeros((5, 5, 0), np.uint8), "shape (5, 5, 0)"),
        (RGB.astype(np.int64), "dtype int64, is neither uint8, uint16, bool nor floats"),
        (RGB.astype(np.complex64), "dtype complex64"),
        (2 * COLOR - 1, "dtype float32, has floats from -1 to 1: scale them to 0 (black) to 1 (white)"),
        (COLOR * 255, "has floats from 0 to 255"),
        (np.where(COLOR > 0.5, np.nan, COLOR), "has floats from nan to nan"),
        (jnp.asarray(COLOR, jnp.bfloat16), "dtype bfloat16"),
    ],
)
def test_other_arrays_are_refused_with_their_shape_and_dtype(values, words):
    assert words in refusal(values)
