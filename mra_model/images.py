"""Reading pictures from anywhere: a file that is not what it says ends in an error, not in an exhausted machine."""

import io
import warnings
from os import PathLike
from pathlib import Path

from PIL import Image

# Pillow knows more formats; some of them start other programs or are rarely attacked and so rarely fixed.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
# The processor pads to a square: a picture of 1 x 60000 pixels is small, its square is 10 GiB.
MAX_SQUARE = 2**27

# Bits that a mode has beyond the eight that convert("RGB") keeps; it would clip to white instead of scaling.
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_UNSCALED = ("I", "F")


class ImageError(ValueError):
    """A picture that cannot be read, or is larger than the limits of this module."""


def load_image(source: str | PathLike[str] | bytes) -> Image.Image:
    """Reads a picture into RGB, as the authors do: alpha is dropped, of an animation the first frame is taken.

    Args:
        source: a file's path, or a file's bytes.

    Returns:
        An RGB picture; grey values of 16 bits are scaled to 8.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not a picture in one of `FORMATS`, truncated, of more than `MAX_BYTES` or `MAX_PIXELS`, padded to
            a square larger than `MAX_SQUARE` pixels, or with values of an unknown range.
    """
    name = "the picture" if isinstance(source, bytes) else str(source)
    data = _read(source, name)
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is only a warning; the limits here are lower and checked next.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size, name)
        return _to_rgb(image, name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than {MAX_PIXELS} pixels; resize it first") from error
    except Exception as error:
        # Decoders raise almost anything on a damaged file: OSError, SyntaxError, struct.error, ValueError, ...
        raise ImageError(
            f"{name} cannot be read as a picture ({type(error).__name__}): it is damaged, truncated or none of "
            f"{', '.join(FORMATS)}; save it again as PNG or JPEG"
        ) from error


def _read(source: str | PathLike[str] | bytes, name: str) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        if "\0" in name:
            raise ImageError(f"the path {name!r} contains a NUL character")
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such file")
        if not path.is_file():
            raise ImageError(f"{name} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} has more than {MAX_BYTES // 2**20} MiB; save it smaller")
    return data


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS or max(width, height) ** 2 > MAX_SQUARE:
        raise ImageError(
            f"{name} has {width} x {height} pixels; allowed are {MAX_PIXELS} in all and, padded to a square, "
            f"{MAX_SQUARE}; resize it first"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _UNSCALED:
        raise ImageError(
            f"{name} has {image.mode!r} values, whose range is unknown; save it with 8 or 16 bits a channel"
        )
    if image.mode in _SIXTEEN_BIT:
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")
