"""Pixels equal CLIP's and LLaVA's image processors bit for bit; every file that cannot give them is refused by name."""

import base64
import io
import re
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_fn.data.image import FILL, MAX_PIXELS, from_base64, open_image, pad_to_square, resize_crop, to_pixels, to_rgb
from llava_fn.errors import BadRecord
from llava_fn.vit import normalise

SIZES = [(640, 480), (480, 640), (336, 336), (337, 336), (336, 501), (335, 334), (37, 1000), (1000, 38), (5, 3), (1, 1)]


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(width, height):
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 127 * np.sin(x / 31 + y / 17 + phase) for phase in (0, 2, 4)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encode(img, format, **options):
    out = io.BytesIO()
    img.save(out, format, **options)
    return out.getvalue()


def png(width, height, depth=8, color=0, data=b""):
    """A PNG with any header, true or not."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def processor(mode, size):
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return LlavaImageProcessorPil(do_pad=True, **sizes) if mode == "pad" else CLIPImageProcessorPil(**sizes)


def assert_equals_processor(img, size, mode):
    ours = normalise(to_pixels(img, size, mode)[None])
    theirs = processor(mode, size)(img, return_tensors="pt")["pixel_values"]
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


def refused(source, *words, **options):
    with pytest.raises(BadRecord) as caught:
        open_image(source, **options)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


# Pixels against the processors that LLaVA's weights know


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("make", [noise, smooth])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_clip_processor_bit_for_bit(size, make, mode):
    assert_equals_processor(make(*size), 336, mode)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.sampled_from(["square", "pad"]))
@example(width=1, height=5000, size=4, mode="square")
@example(width=5000, height=1, size=4, mode="square")
@example(width=1, height=5000, size=4, mode="pad")
@example(width=5000, height=1, size=4, mode="pad")
def test_pixels_equal_the_clip_processor_for_any_shape(width, height, size, mode):
    assert_equals_processor(noise(width, height, seed=width * 97 + height), size, mode)


def test_pixels_are_contiguous_uint8_of_the_asked_size():
    for mode in ("square", "pad"):
        pixels = to_pixels(smooth(50, 31), 24, mode)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 24) and pixels.is_contiguous()


def test_padding_centres_the_image_on_the_mean_colour():
    assert FILL == (122, 116, 104)
    for width, height, box in [(10, 5, (0, 2, 10, 7)), (4, 9, (2, 0, 6, 9)), (6, 6, (0, 0, 6, 6))]:
        square = pad_to_square(noise(width, height))
        assert square.size == (max(width, height),) * 2
        assert square.crop(box).tobytes() == noise(width, height).tobytes()
        outside = np.ones((square.height, square.width), bool)
        outside[box[1] : box[3], box[0] : box[2]] = False
        assert (np.asarray(square)[outside] == FILL).all()


def test_square_mode_loses_the_ends_and_pad_mode_keeps_them():
    img = Image.new("RGB", (90, 30), (0, 0, 255))
    img.paste((255, 0, 0), (0, 0, 20, 30))
    assert to_pixels(img, 30, "square")[0].max() == 0
    assert to_pixels(img, 30, "pad")[0].max() > 250


def test_too_extreme_shapes_are_refused_by_name():
    with pytest.raises(BadRecord, match="strip.png.*1x5000.*336x1680000"):
        to_pixels(Image.new("RGB", (1, 5000)), 336, "square", "strip.png")
    with pytest.raises(BadRecord, match="strip.png.*20000x1.*20000x20000"):
        to_pixels(Image.new("RGB", (20_000, 1)), 336, "pad", "strip.png")


def test_unknown_modes_sizes_and_colours_are_refused():
    for mode in ("crop", "Pad", "", None):
        with pytest.raises(ValueError, match="'square'.*'pad'"):
            to_pixels(noise(4, 4), 8, mode)
    with pytest.raises(ValueError, match="at least 1"):
        to_pixels(noise(4, 4), 0, "square")
    for step in (pad_to_square, lambda img: resize_crop(img, 4)):
        with pytest.raises(ValueError, match="mode P"):
            step(noise(4, 4).quantize())


def test_normalise_keeps_the_dtype_asked_for_and_rounds_once():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    full = normalise(pixels)
    assert full.dtype == torch.float32 and full.shape == pixels.shape
    assert torch.equal(normalise(pixels, torch.bfloat16), full.to(torch.bfloat16))
    first = torch.tensor([(0 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258, (0 - 0.40821073) / 0.27577711])
    torch.testing.assert_close(full[0, :, 0, 0], first)


def test_normalise_refuses_what_is_not_a_batch_of_uint8_pixels():
    byte = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    for bad in (byte.float(), byte[0], byte[0].transpose(0, 1), byte.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"uint8\[images, 3"):
            normalise(bad)


# Kinds of files


def kinds():
    rgba = noise(20, 15, 4)
    few = noise(20, 15).quantize(40)
    palette_alpha = few.copy()
    palette_alpha.info["transparency"] = bytes(range(0, 160, 4))
    oriented = Image.Exif()
    oriented[0x0112] = 6
    rgb = noise(20, 15)
    return {
        "rgb.jpg": encode(rgb, "JPEG"),
        "gray.jpg": encode(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "oriented.jpg": encode(rgb, "JPEG", exif=oriented),
        "rgb.png": encode(rgb, "PNG"),
        "rgba.png": encode(rgba, "PNG"),
        "gray_alpha.png": encode(rgba.convert("LA"), "PNG"),
        "bilevel.png": encode(rgb.convert("1"), "PNG"),
        "palette.png": encode(few, "PNG"),
        "palette_one_clear.png": encode(few, "PNG", transparency=3),
        "palette_alpha.png": encode(palette_alpha, "PNG"),
        "rgb_one_clear.png": encode(rgb, "PNG", transparency=(1, 2, 3)),
        "single.gif": encode(few, "GIF", transparency=2),
        "rgb.webp": encode(rgb, "WEBP"),
        "rgba.webp": encode(rgba, "WEBP", lossless=True),
        "rgb.bmp": encode(rgb, "BMP"),
        "rgb.ppm": encode(rgb, "PPM"),
        "rgb.jp2": encode(rgb, "JPEG2000"),
        "rgb.tif": encode(rgb, "TIFF", compression="tiff_lzw"),
        "cmyk.tif": encode(rgb.convert("CMYK"), "TIFF"),
        "ycbcr.tif": encode(rgb.convert("YCbCr"), "TIFF"),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", kinds())
def test_eight_bit_files_equal_pillows_rgb_as_in_llava(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(kinds()[name])
    with Image.open(path) as img:
        expected = img.convert("RGB")
    for source in (path, str(path), path.read_bytes()):
        img = open_image(source)
        assert (img.mode, img.size) == ("RGB", (20, 15))
        assert img.tobytes() == expected.tobytes()


def test_decoding_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in kinds().values():
            open_image(content)


def test_alpha_is_dropped_and_the_hidden_colour_stays():
    img = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert open_image(encode(img, "PNG")).getpixel((0, 0)) == (10, 20, 30)


def test_exif_orientation_of_a_jpeg_is_ignored():
    assert open_image(kinds()["oriented.jpg"]).size == (20, 15)


def test_the_content_decides_the_format_not_the_suffix(tmp_path):
    path = tmp_path / "ocr_vqa.jpg"
    path.write_bytes(kinds()["single.gif"])
    assert open_image(path).tobytes() == open_image(kinds()["single.gif"]).tobytes()
    path.write_bytes(kinds()["rgb.png"])
    assert open_image(path).tobytes() == noise(20, 15).tobytes()


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    values = np.array([[0, 255, 256, 32768], [40000, 65279, 65280, 65535]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    for content in (png(4, 2, depth=16, data=rows), b"P5 4 2 65535\n" + values.tobytes()):
        got = np.asarray(open_image(content))
        assert got[..., 0].tolist() == [[0, 0, 1, 128], [156, 254, 255, 255]]
        assert (got == got[..., :1]).all()


def test_sixteen_bit_gray_equals_the_same_picture_stored_as_sixteen_bit_colour():
    values = np.random.default_rng(1).integers(0, 65536, (5, 7)).astype(">u2")
    gray = b"".join(b"\0" + row.tobytes() for row in values)
    color = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in values)
    a, b = open_image(png(7, 5, 16, 0, gray)), open_image(png(7, 5, 16, 2, color))
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB"])
def test_tiffs_without_a_defined_white_are_refused(mode):
    refused(encode(Image.new(mode, (3, 3)), "TIFF"), "scan.tif", "TIFF", mode, "8 bits", name="scan.tif")


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_or_pages_are_refused(format, tmp_path):
    path = tmp_path / "moving"
    path.write_bytes(encode(noise(9, 9), format, save_all=True, append_images=[noise(9, 9, seed=s) for s in (1, 2)]))
    refused(path, str(path), format, "3 frames")


def test_the_first_picture_of_a_camera_mpo_is_the_image():
    main, preview = smooth(32, 24), smooth(8, 6)
    content = encode(main, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert open_image(content).tobytes() == open_image(encode(main, "JPEG")).tobytes()


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg' width='4' height='4'/>",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        b"<!DOCTYPE html><html>404 not found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        bytes(2000),
    ],
)
def test_what_is_no_image_is_refused_by_name(content, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    refused(path, str(path), "PNG or JPEG", repr(content[:16]))


def test_missing_files_directories_and_empty_files_are_refused_by_path(tmp_path):
    (tmp_path / "empty.jpg").touch()
    refused(tmp_path / "gone.jpg", str(tmp_path / "gone.jpg"), "No such file")
    refused(tmp_path, str(tmp_path), "directory")
    refused(tmp_path / "empty.jpg" / "x.jpg", "x.jpg", "Not a directory")
    refused(tmp_path / ("x" * 300), "too long")
    refused("a\0b.jpg", "a\\x00b.jpg")
    refused(tmp_path / "empty.jpg", str(tmp_path / "empty.jpg"), "empty")
    refused(b"", "image bytes", "empty")
    refused(b"", "record 7", name="record 7")


def test_a_disk_error_is_not_taken_for_a_bad_record(monkeypatch):
    def read_bytes(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(OSError, match="Too many open files"):
        open_image("a.jpg")


# Truncated and broken files, bombs

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_never_gives_invented_pixels(format, tmp_path):
    img = smooth(60, 44).quantize() if format == "GIF" else smooth(60, 44)
    content = encode(img, format)
    full = open_image(content).tobytes()
    cuts = {*range(0, len(content), max(1, len(content) // 40)), *range(len(content) - 12, len(content))}
    refusals = 0
    for cut in sorted(cuts):
        try:  # only the end marker may be lost
            assert open_image(content[:cut], "cut.img").tobytes() == full, cut
        except BadRecord as error:
            assert "cut.img" in str(error)
            refusals += 1
    assert refusals >= 40
    path = tmp_path / "half"
    path.write_bytes(content[: len(content) // 2])
    refused(path, str(path))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), format=st.sampled_from(FORMATS))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_bad_record_and_nothing_else(data, format):
    content = bytearray(encode(smooth(24, 20).quantize() if format == "GIF" else smooth(24, 20), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadRecord):
        img = open_image(bytes(content), max_pixels=10_000)
        assert img.mode == "RGB" and img.width * img.height <= 10_000


def test_a_truncated_file_is_refused_whatever_other_libraries_set(monkeypatch):
    content = encode(smooth(60, 44), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for source in (content, content[: len(content) // 2]):
        with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES") as caught:
            open_image(source)
        assert not isinstance(caught.value, BadRecord)  # a policy of skipping must not swallow it


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 14_000, 100_000, 2**31 - 1])
def test_decompression_bombs_are_refused_before_decoding(side, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side))
    refused(path, str(path), str(MAX_PIXELS), str(side * side))


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_bomb_is_a_bad_record_under_any_warning_filter(action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        refused(png(10_000, 10_000), "bomb.png: ", "over the limit", "100000000", name="bomb.png")


def test_every_image_that_pillow_would_warn_about_is_over_the_limit():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_the_pixel_limit_is_inclusive_and_checked_on_the_header():
    content = encode(noise(20, 15), "PNG")
    assert open_image(content, max_pixels=300).size == (20, 15)
    refused(content, "a.png", "20x15", "300", "299", max_pixels=299, name="a.png")
    refused(png(20, 15, data=b""), "20x15", "299", max_pixels=299)  # undecodable, yet refused for its size
    for limit in (0, -1, MAX_PIXELS + 1):
        with pytest.raises(ValueError, match="max_pixels"):
            open_image(content, max_pixels=limit)


def test_an_image_without_pixels_is_refused():
    refused(png(0, 5), "none.png", name="none.png")
    refused(b"P6 0 0 255\n", "none.ppm", name="none.ppm")


def test_pillows_globals_stay_as_they_were():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    open_image(encode(noise(4, 4), "PNG"))
    refused(png(10_000, 100_000), "limit")
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (700, 513), (300, 700), (24, 24), (25, 24), (600, 256)])
def test_padding_by_strips_is_padding_the_whole(size):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    img = Image.fromarray(noise)
    for side in (24, 336):
        want = np.array(resize_crop(pad_to_square(img), side))
        assert np.array_equal(to_pixels(img, side, "pad").permute(1, 2, 0).numpy(), want)


def test_a_long_image_takes_no_more_memory_than_its_pixels():
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    img = Image.new("RGB", (16_000, 2))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    to_pixels(img, 336, "pad")
    assert peak() - before < 100_000  # KiB; its square has a million


# EXIF and transparency


def odd_image():
    """Red above, clear green below, to be turned by a quarter; as a PNG."""
    img = Image.new("RGBA", (20, 30), (255, 0, 0, 255))
    img.paste((0, 255, 0, 0), (0, 15, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # its left side is up
    return encode(img, "PNG", exif=exif)


@pytest.mark.parametrize(
    "reading, size, first, last",
    [
        ("original", (20, 30), (255, 0, 0), (0, 255, 0)),  # LLaVA: Image.open(path).convert("RGB")
        ("hf", (30, 20), (0, 255, 0), (255, 0, 0)),
        ("shown", (30, 20), (255, 255, 255), (255, 0, 0)),
    ],
)
def test_a_reading_decides_what_becomes_of_exif_and_transparency(reading, size, first, last):
    content = odd_image()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    with Image.open(io.BytesIO(content)) as opened:
        images = [open_image(content, reading=reading), from_base64(url, reading=reading)]
        images.append(to_rgb(opened, reading=reading))
    for img in images:
        assert (img.size, img.getpixel((0, 0)), img.getpixel((img.width - 1, img.height - 1))) == (size, first, last)


def test_the_reading_of_transformers_is_that_of_its_load_image():
    content = odd_image()
    theirs = load_image("data:image/png;base64," + base64.b64encode(content).decode())
    assert np.array_equal(np.asarray(open_image(content, reading="hf")), np.asarray(theirs))
    for mode in ("P", "L", "LA", "1", "RGB"):
        plain = encode(noise(9, 7).convert("L").convert(mode), "PNG")
        assert open_image(plain, reading="shown").tobytes() == open_image(plain).tobytes()


def test_an_unknown_reading_is_refused():
    for read in (open_image, lambda content, reading: to_rgb(noise(2, 2), reading=reading)):
        with pytest.raises(ValueError, match="image reading 'upright': must be one of original, hf, shown"):
            read(odd_image(), reading="upright")


def test_deep_gray_keeps_its_scale_in_every_reading():
    deep = encode(Image.fromarray(np.full((3, 2), 0x8000, np.uint16)), "PNG")
    assert {open_image(deep, reading=reading).getpixel((0, 0)) for reading in ("original", "hf", "shown")} == {
        (128,) * 3
    }
