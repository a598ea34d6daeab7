"""Images of any kind that people have, as RGB values: files, PIL images and arrays."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, features

from osv_jax.errors import UserError
from osv_jax.runtime.paths import Path, as_path

# A file, a PIL image, or values [h w] or [h w c] (see `read_image`).
ImageLike = str | os.PathLike | Image.Image | np.ndarray | jax.Array

# Of images in folders. Not .gif: `osv_jax.sample` writes videos of that name.
EXTENSIONS = (
    *(".avif", ".bmp", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
# Not all that Pillow knows: some of its formats run other programs (EPS), or name other files.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# What undoes each value of EXIF's Orientation.
_UPRIGHT: Mapping[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(image: ImageLike, max_pixels: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """RGB values of an image as a viewer shows it, of several frames or pages the first.

    Cameras' rotation marks are heeded, what is transparent lies on white, and more than 8 bits are rounded to 8.
    Embedded colour profiles are not applied.

    Args:
        image: a file; a PIL image; or values [height, width] or [height, width, channels] with 1 (grey), 2 (grey,
            alpha), 3 (RGB) or 4 (RGB, alpha) channels: uint8, uint16, bool, or floats in [0, 1].
        max_pixels: of a file; a larger one is refused before it is decoded. Pillow has a limit of its own.

    Raises:
        UserError: a file that is missing, damaged, too large or of another kind; values of another shape or range.
    """
    if isinstance(image, str | os.PathLike):
        return _read_file(as_path(image), max_pixels)
    with _reading("The image"):
        return _pixels(image, "The image") if isinstance(image, Image.Image) else _from_values(np.asarray(image))


def _from_values(values: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    name = f"The image, an array of shape {values.shape} and dtype {values.dtype},"
    if 0 in values.shape or not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] <= 4)):
        raise UserError(
            f"{name} does not have the shape [height, width] or [height, width, channels] with 1 to 4 channels."
        )
    # Pillow has no name for one channel.
    values = values[..., 0] if values.shape[2:] == (1,) else values
    return _pixels(Image.fromarray(np.ascontiguousarray(_to_uint8(values, name))), name)


def _read_file(path: Path, max_pixels: int | None) -> UInt8[np.ndarray, "h w 3"]:
    with _reading(path):
        if not path.is_file():
            raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}: give an image file.")
        with path.open("rb") as file:
            formats = _FORMATS + _check_codec(path, file.read(64))
            with Image.open(file, formats=formats) as opened:
                if max_pixels is not None and opened.width * opened.height > max_pixels:
                    raise UserError(f"{path} has more than {max_pixels:,} pixels: scale it down first.")
                return _pixels(opened, path)


@contextlib.contextmanager
def _reading(name: str | Path) -> Iterator[None]:
    """Whatever Pillow raises inside becomes a `UserError`, and what it warns of (odd metadata, size) is left unsaid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        most = f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}"
        raise UserError(f"{name} has more than {most} pixels: scale it down first.") from error
    except Exception as error:  # Its decoders meet damage with exceptions of all kinds.
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"damaged, or of a kind that Pillow does not read; {', '.join(_FORMATS)} are read"
        raise UserError(
            f"{name} cannot be read as an image ({reason}): save it anew as PNG or JPEG, or leave it out."
        ) from error


def _check_codec(path: Path, header: bytes) -> tuple[str, ...]:
    """The format to be added for HEIC, which another package reads; a `UserError` if what the file takes is missing."""
    # An ISO base media file begins with a box of names of what it holds: size, `ftyp`, main brand, version, brands.
    if header[4:8] != b"ftyp":
        return ()
    brands = header[8 : int.from_bytes(header[:4])]
    if any(brand in brands for brand in (b"avif", b"avis")):
        if not features.check("avif"):
            raise UserError(
                f"{path} is an AVIF image, which this build of Pillow does not read: run `pip install --upgrade"
                " pillow`, or convert the image to PNG."
            )
        return ()
    if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")):
        try:
            import pillow_heif
        except ImportError as error:
            raise UserError(
                f"{path} is a HEIC image, which Pillow alone does not read: run `pip install pillow-heif`, or convert"
                " the image to PNG."
            ) from error
        pillow_heif.register_heif_opener()
        return ("HEIF",)
    return ()


def _pixels(image: Image.Image, name: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    image.load()  # Before the rotation is asked for: TIFF's is undone here, and PNG's may come behind the picture.
    upright = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey(image, name)
    if image.has_transparency_data:
        # Pillow has no way from premultiplied grey to RGBA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(image if upright is None else image.transpose(upright))


def _upright(image: Image.Image) -> Image.Transpose | None:
    """What the camera's rotation mark asks for.

    `ImageOps.exif_transpose` would do the same, and write all other tags anew, which fails where one is malformed.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's parser meets damaged EXIF with exceptions of all kinds; the picture itself is whole.
        return None


def _grey(image: Image.Image, name: str | Path) -> Image.Image:
    """Grey values of more than 8 bits, which Pillow's `convert` would cut off at 255."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I":
        if image.format != "PPM":  # That Pillow scales to 16 bits.
            raise UserError(f"{name} holds 32-bit or signed integers, whose white is unknown: save it in 8 or 16 bits.")
        values = values.astype(np.uint16)
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        values = (values.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    grey = _to_uint8(values, name)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # White is zero.
        grey = 255 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
    return Image.fromarray(grey)


def _to_uint8(values: np.ndarray, name: str | Path) -> UInt8[np.ndarray, "h w *channels"]:
    """Values of any kind whose range is known, 0 to 255."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "u" and size == 1:
        return values
    if kind == "b":
        return values * np.uint8(255)
    if kind == "u" and size == 2:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # Neither holds for NaN.
            raise UserError(f"{name} has floats from {low:g} to {high:g}: scale them to 0 (black) to 1 (white).")
        return (values * 255).round().astype(np.uint8)
    raise UserError(f"{name} is neither uint8, uint16, bool nor floats from 0 to 1: convert it to one of these.")
