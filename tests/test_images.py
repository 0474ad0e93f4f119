"""`load_image` on pictures of every mode, and on files made to break it."""

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mra_model import ImageError, images, load_image


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png_of_zeros(width: int, height: int) -> bytes:
    """A black 1-bit PNG, written row by row so that a huge one stays small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes((width + 7) // 8 + 1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
JPEG = encode(NOISE, "JPEG")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes_become_rgb(mode: str) -> None:
    source = Image.new(mode, (5, 7), 1 if mode == "1" else None)
    image = load_image(encode(source, "TIFF" if mode in ("CMYK", "I;16") else "PNG"))
    assert (image.mode, image.size) == ("RGB", (5, 7))
    if mode not in ("I;16", "CMYK"):
        assert np.array_equal(np.array(image), np.array(source.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    values = np.array(load_image(encode(Image.fromarray(ramp))))
    assert np.abs(values[..., 0].astype(int) - ramp // 256).max() <= 1
    assert values.max() == 255


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused(dtype: type) -> None:
    with pytest.raises(ImageError, match="range is unknown"):
        load_image(encode(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


def test_a_path_and_its_bytes_are_the_same_picture(data_dir: Path) -> None:
    path = data_dir / "llava_data" / "rocket.jpg"
    expected = np.array(Image.open(path).convert("RGB"))
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(np.array(load_image(source)), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_truncation_is_an_error_or_a_whole_picture(kind: str, tmp_path) -> None:
    data = encode(NOISE, kind)
    file = tmp_path / f"half.{kind.lower()}"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=f"{file.name} cannot be read.*PNG or JPEG"):
        load_image(file)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", JPEG[:20]]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="the picture cannot be read"):
        load_image(data)


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (10000, 10000), (1, 20000), (20000, 1)])
def test_bombs_are_refused_before_decoding(width: int, height: int, monkeypatch) -> None:
    """Too many pixels, or few whose padded square would have too many."""
    data = png_of_zeros(width, height)
    assert len(data) < 2**20
    monkeypatch.setattr(images, "_to_rgb", lambda *_: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"pixels.*resize it first"):
            load_image(data)


def test_too_many_bytes_are_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", len(JPEG) - 1)
    file = tmp_path / "large.jpg"
    file.write_bytes(JPEG)
    for source in (file, JPEG):
        with pytest.raises(ImageError, match="MiB"):
            load_image(source)


def test_wrong_paths_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="NUL"):
        load_image("a\0b.png")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(JPEG) - 1), value=st.integers(0, 255), length=st.integers(0, len(JPEG)))
def test_damaged_files_end_in_one_kind_of_error(position: int, value: int, length: int) -> None:
    data = bytearray(JPEG)
    data[position] = value
    with contextlib.suppress(ImageError):
        assert load_image(bytes(data[:length])).mode == "RGB"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_end_in_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        load_image(data)
