"""Image files to pixels: decode, make square, resize (the CLIP image processor of LLaVA-1.5, but for `vit.normalise`).

open_image    file or bytes              -> RGB PIL image, full size
from_base64   base64 or data URL         -> the same
to_rgb        PIL image of any mode      -> the same
to_pixels     RGB PIL image              -> uint8[3, size, size]      on the CPU, in the data loader
i images; size in pixels (336 for CLIP ViT-L/14-336). Resizing is Pillow's bicubic filter on 8-bit values: torch's
interpolate gives other numbers, and LLaVA's weights were trained with these.

An image that cannot be decoded to the pixels that its author meant raises BadRecord, with the name of the file. No
image is replaced, truncated or clipped.
"""

import base64
import errno
import io
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llava_fn.config import Vision
from llava_fn.data.options import MAX_PIXELS, READINGS
from llava_fn.errors import BadRecord

_RED, _GREEN, _BLUE = Vision.mean
FILL = (int(255 * _RED), int(255 * _GREEN), int(255 * _BLUE))
"""The mean colour, (122, 116, 104): what LLaVA pads with (mm_utils.py expand2square)."""

MAX_CANVAS = 16_384**2
"""Largest padded or resized intermediate image, in pixels: 1.1 GB, because Pillow keeps four bytes for an RGB pixel."""

ROWS = 256  # of an image that are padded at a time

# A list, because Pillow's other plugins guess at formats without a signature, or run programs (EPS). JPEG includes MPO,
# a JPEG file with more pictures behind the first.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
# The modes of 8 bits a value that these formats decode to and for which Pillow's conversion to RGB has one meaning.
MODES_8BIT = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
MODES_16BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_URL_SAFE = str.maketrans("-_", "+/")
# Errors that a wrong path causes. Others, like too many open files, do not make the record a bad one.
BAD_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)


def open_image(
    source: str | Path | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS, reading: str = "original"
) -> Image.Image:
    """Decode one image to RGB, like `Image.open(source).convert("RGB")` in LLaVA train.py, or say why not.

    source: path, or the content of a file. name: how errors call it, by default the path. max_pixels: limit on
    width * height, checked on the header before decoding, at most MAX_PIXELS. The content, not the suffix, decides the
    format (OCR-VQA holds GIFs named .jpg). reading: what becomes of transparency and of EXIF's orientation; as in LLaVA
    alpha is dropped, the hidden colour stays, and the orientation is ignored. 16-bit colour is cut to its high byte by
    Pillow. Of an MPO (a camera's JPEG with a preview or a depth map behind it) the first picture is the image.

    Raises BadRecord for a missing, empty, truncated or broken file, another format (SVG, HEIC, AVIF, HTML), more than
    one frame or page, too many pixels, or pixels whose conversion to 8-bit RGB is undefined (float, 32-bit, LAB).
    JPEG has no checksum: damage inside it that decodes to wrong pixels cannot be seen. ValueError for a bad max_pixels,
    and where another library has set PIL.ImageFile.LOAD_TRUNCATED_IMAGES, which fills what is missing with gray.

    Differs: 16-bit gray PNG and PGM are scaled by their high byte; LLaVA's convert("RGB") clips all above 255 to white.
    Differs: several frames or pages are refused; LLaVA takes the first.
    """
    if not 1 <= max_pixels <= MAX_PIXELS:
        raise ValueError(f"max_pixels={max_pixels}: must be from 1 to {MAX_PIXELS}, above which Pillow itself objects")
    _check_reading(reading)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set in this process, so truncated images would pass, filled with "
            "gray; find the library that sets it, and set it to False"
        )
    name = name or ("image bytes" if isinstance(source, bytes) else str(source))
    return _decode(_read(source, name), name, max_pixels, reading)


def from_base64(
    text: str, name: str = "base64 image", max_pixels: int = MAX_PIXELS, reading: str = "original"
) -> Image.Image:
    """The RGB image in base64 or in a data URL of base64, as `open_image` of its bytes. Raises BadRecord.

    Lines may be broken, the alphabet may be that of URLs, and padding may be left out; a data URL may be escaped.
    Source: RFC 4648; WHATWG's forgiving-base64 decode.
    """
    head, comma, data = text.partition(",")
    if comma and not (head[:5].lower() == "data:" and head[-7:].lower() == ";base64"):
        raise BadRecord(f"{name}: a data URL begins with data:image/...;base64, and not with {head[:40]!r}")
    data = "".join((unquote(data) if comma else text).split()).rstrip("=").translate(_URL_SAFE)
    try:
        content = base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise BadRecord(f"{name}: no base64 ({error}); encode the bytes of an image file") from error
    return open_image(content, name, max_pixels, reading)


def to_rgb(
    img: Image.Image, name: str = "image", max_pixels: int = MAX_PIXELS, reading: str = "original"
) -> Image.Image:
    """An image that is open in Pillow, of any mode, as RGB. Raises BadRecord as `open_image` does."""
    _check_reading(reading)
    _check_header(img, name, max_pixels)
    return _to_rgb(img, name, reading)


def _check_reading(reading: str) -> None:
    if reading not in READINGS:
        raise ValueError(f"image reading {reading!r}: must be one of {', '.join(READINGS)}")


def _read(source: str | Path | bytes, name: str) -> bytes:
    """The content of the file. It is read before decoding, so that a disk error is not taken for a bad image."""
    try:
        if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
            raise OSError(errno.EISDIR, "a directory or a device, and no file")  # a device may have no end
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        if error.errno not in BAD_PATH:
            raise OSError(error.errno, error.strerror, name) from error  # of reading it has no name
        raise BadRecord(f"{name}: cannot be read ({error.strerror}); correct the path or fetch the image") from error
    except ValueError as error:  # a NUL character in the path
        raise BadRecord(f"{name!r}: not a path ({error}); correct the record") from error
    if not data:
        raise BadRecord(f"{name}: the file is empty (0 bytes); fetch the image again")
    return data


def _decode(data: bytes, name: str, max_pixels: int, reading: str) -> Image.Image:
    """Header checks, pixels, RGB. Pillow raises nearly every kind of exception on broken bytes; all mean BadRecord."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as img:
            _check_header(img, name, max_pixels)
            img.load()
            return _to_rgb(img, name, reading)
    except (BadRecord, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadRecord(
            f"{name}: not one of {', '.join(FORMATS)}, or cut off in the header (first bytes {data[:16]!r}); "
            "fetch it again, or convert it to PNG or JPEG"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord(f"{name}: over the limit of {max_pixels} pixels ({error}); scale it") from error
    except Exception as error:
        raise BadRecord(f"{name}: truncated or broken ({type(error).__name__}: {error}); fetch it again") from error


def _check_header(img: Image.Image, name: str, max_pixels: int) -> None:
    width, height = img.size
    if width * height > max_pixels:
        raise BadRecord(f"{name}: {width}x{height} = {width * height} pixels, over the limit of {max_pixels}; scale it")
    if img.format != "MPO" and getattr(img, "is_animated", False):
        raise BadRecord(
            f"{name}: {img.format} with {getattr(img, 'n_frames', 'several')} frames or pages, of which only one could "
            "be used; save the one that is meant as a file of its own"
        )


def _to_rgb(img: Image.Image, name: str, reading: str) -> Image.Image:
    if reading == "original":
        return _opaque(img, name, img.format)
    turned = ImageOps.exif_transpose(img)  # which has no format
    if reading == "shown" and turned.has_transparency_data and turned.mode in MODES_8BIT:
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned.convert("RGBA"))
    return _opaque(turned, name, img.format)


def _opaque(img: Image.Image, name: str, form: str | None) -> Image.Image:
    """RGB without alpha. form: of the file."""
    if img.mode in MODES_8BIT:
        img.info.pop("transparency", None)  # alpha is dropped; kept, Pillow warns that it would lose it
        return img.convert("RGB")
    # PNG and PGM define 65535 as white. In TIFF and JPEG2000, 16 bits often hold 12, and would come out black.
    if img.mode in MODES_16BIT and form in ("PNG", "PPM"):
        return Image.fromarray((np.asarray(img) >> 8).astype(np.uint8)).convert("RGB")
    raise BadRecord(
        f"{name}: {form} of Pillow mode {img.mode}, which does not define black and white; save it with 8 bits"
    )


def _check_canvas(img: Image.Image, width: int, height: int, name: str) -> None:
    if img.mode != "RGB":
        raise ValueError(f"{name}: mode {img.mode}, not RGB; open it with open_image")
    if width * height > MAX_CANVAS:
        raise BadRecord(
            f"{name}: {img.width}x{img.height} would become {width}x{height}, over {MAX_CANVAS} pixels; "
            "crop it to a less extreme shape or make it smaller"
        )


def pad_to_square(img: Image.Image, fill: tuple[int, int, int] = FILL, name: str = "image") -> Image.Image:
    """Centre an RGB image on a square of side max(width, height) and colour `fill`.

    An odd rest goes below and to the right. Raises BadRecord, with `name`, for a square over MAX_CANVAS pixels.
    Source: LLaVA mm_utils.py expand2square.
    """
    side = max(img.size)
    _check_canvas(img, side, side, name)
    square = Image.new("RGB", (side, side), fill)
    square.paste(img, ((side - img.width) // 2, (side - img.height) // 2))
    return square


def _padded(img: Image.Image, size: int, name: str) -> Image.Image:
    """The image of `pad_to_square`, resized to size x size. The square, of a long image a gigabyte, is never made.

    As Pillow does, rows are resized first, some of them at a time, and columns then. Rows of one colour keep it.
    """
    side = max(img.size)
    _check_canvas(img, side, side, name)
    left, top = (side - img.width) // 2, (side - img.height) // 2
    narrow = Image.new("RGB", (size, side), FILL)
    for y in range(0, img.height, ROWS):
        rows = img.crop((0, y, img.width, min(y + ROWS, img.height)))
        strip = Image.new("RGB", (side, rows.height), FILL)
        strip.paste(rows, (left, 0))
        narrow.paste(strip.resize((size, rows.height), Image.Resampling.BICUBIC), (0, top + y))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def resize_crop(img: Image.Image, size: int, name: str = "image") -> Image.Image:
    """Resize the shorter edge of an RGB image to `size` pixels (bicubic), then cut the central size x size out.

    Raises BadRecord, with `name`, where the resized image would have over MAX_CANVAS pixels (for 336: a shape beyond
    2377 to 1). Source: CLIPImageProcessor in transformers; longer edge int(size * long / short), crop offset rounded
    down (torchvision's CenterCrop can lie one pixel off).
    """
    if size < 1:
        raise ValueError(f"size={size}: must be at least 1 pixel")
    long = int(size * max(img.size) / min(img.size))
    width, height = (size, long) if img.width <= img.height else (long, size)
    _check_canvas(img, width, height, name)
    left, top = (width - size) // 2, (height - size) // 2
    return img.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def to_pixels(img: Image.Image, size: int, mode: str, name: str = "image") -> torch.Tensor:
    """RGB PIL image -> uint8[3, size, size], contiguous.

    mode "square": shorter edge to size, centre crop; what lies outside the central square is lost (LLaVA stage 1).
    mode "pad": padded to a square with the mean colour, then resized (LLaVA stage 2 and evaluation).
    Raises ValueError for another mode; BadRecord, with `name`, for a shape too extreme to resize.
    """
    if mode not in ("square", "pad"):
        raise ValueError(f"image mode {mode!r}: must be 'square' (resize and centre crop) or 'pad' (pad to a square)")
    img = _padded(img, size, name) if mode == "pad" else resize_crop(img, size, name)
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()
