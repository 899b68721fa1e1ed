"""Pictures with Pillow: any that is read here becomes RGB, upright, on white."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from omni_jax.errors import InputError
from omni_jax.processing.sources import is_located, locate_source

# Pillow tries these, MPO as JPEG, and no others: some of its formats start other programs (EPS), and only these are
# tested
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
MAX_IMAGE_PIXELS = 80_000_000
# of formats with decoders that hold several copies of the picture: WebP's needs 16 bytes a pixel
MAX_PIXELS_OF_FORMAT = {"WEBP": 25_000_000, "AVIF": 25_000_000, "JPEG2000": 25_000_000}


def read_image(source: Any) -> Image.Image:
    """A picture in RGB, upright; what is transparent becomes white. Of an animation, the first frame.

    Args:
      source: what ``sources.locate_source`` takes, a Pillow image, or uint8 [height, width] or [height, width, 1, 3 or
        4].

    Raises:
      InputError: if it is not a picture, is cut off, or is too large to be decoded safely.
    """
    if isinstance(source, Image.Image):
        check_pixels(*source.size, MAX_IMAGE_PIXELS)
        picture = source
    elif isinstance(source, np.ndarray):
        picture = _image_of_array(source)
    elif is_located(source):
        picture = _decode_image(source)
    else:
        raise InputError(f"expected a path, a URL or bytes, got {type(source).__name__}")
    try:
        return to_rgb(picture)
    except InputError:
        raise
    except Exception as e:  # Pillow cannot convert some modes, and decodes a picture that it was given only now
        raise InputError(f"a picture of mode {picture.mode} cannot be brought to RGB: {e}") from e


def find_encoded(source: Any) -> Any:
    """Of a Pillow picture whose pixels have not been decoded, the bytes of its file; of a list of them, a list.

    Anything else comes back as it is. So what is sent to another process is decoded there, and not to be sent.

    Raises:
      InputError: if the file cannot be read any more.
    """
    if isinstance(source, list | tuple):
        return [_find_file(item) for item in source]
    return _find_file(source)


def _find_file(picture: Any) -> Any:
    # Pillow lets go of a file when it has decoded it; another frame than the first was decoded to be found
    if not isinstance(picture, ImageFile.ImageFile) or picture.fp is None or picture.tell():
        return picture
    try:
        position = picture.fp.tell()
        picture.fp.seek(0)
        data = picture.fp.read()
        picture.fp.seek(position)
    except (OSError, ValueError) as e:  # ValueError: it has been closed
        raise InputError(f"the file of the picture cannot be read: {e}") from e
    return data


def check_pixels(width: int, height: int, limit: int) -> None:
    """Raises InputError for a picture over a limit of pixels."""
    if width * height > limit:
        raise InputError(f"{width} x {height} pixels are over the limit of {limit}; make it smaller")


def to_rgb(picture: Image.Image) -> Image.Image:
    """Turns a picture upright, puts it on white and brings it to 8 bits a channel.

    Raises:
      InputError: for a mode without a fixed range of brightness.
    """
    # first of all, for the pictures that are made below do not carry the EXIF data along
    picture = _turn_upright(picture)
    # 16 bits of brightness: the upper byte is the brightness in 8 bits
    if picture.mode.startswith("I;16"):
        high_bytes = (np.asarray(picture) >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"a picture of mode {picture.mode} has no fixed range of brightness; save it as 8 or 16 bits")
    # an alpha channel, or a colour of a palette that is marked as transparent
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def _decode_image(source: Any) -> Image.Image:
    with locate_source(source).open() as file:
        try:
            # opening reads the header alone, so the size is checked before memory is taken for the pixels
            picture = Image.open(file, formats=IMAGE_FORMATS)
            limit = MAX_PIXELS_OF_FORMAT.get(str(picture.format), MAX_IMAGE_PIXELS)
            check_pixels(*picture.size, limit)
            # while the file is open: Pillow reads pixels when they are first asked for
            picture.load()
            # some decoders only learn the size as they decode
            check_pixels(*picture.size, limit)
        except Image.DecompressionBombError as e:
            raise InputError(f"it has more pixels than the limit of {MAX_IMAGE_PIXELS}: {e}") from e
        except InputError:
            raise
        except UnidentifiedImageError as e:
            raise InputError(f"not a picture that can be read; known formats: {', '.join(IMAGE_FORMATS)}") from e
        except Exception as e:  # decoders raise whatever they like: struct.error, SyntaxError, MemoryError
            raise InputError(f"not a picture that can be read: {e}") from e
    return picture


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # the metadata are damaged, the pixels are not: it is taken as it stands
        return picture


def _image_of_array(pixels: np.ndarray) -> Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    # floats are refused, for they may lie in 0 to 1 or in 0 to 255, and nothing says which
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise InputError(f"an array must be uint8 [height, width] or [height, width, 1, 3 or 4], got {found}")
    if 0 in pixels.shape:
        raise InputError(f"an array of shape {list(pixels.shape)} holds no pixels")
    check_pixels(pixels.shape[1], pixels.shape[0], MAX_IMAGE_PIXELS)
    # Pillow takes brightness without an axis of channels
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)
