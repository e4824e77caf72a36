"""Images of a row: where they are, and loading them with care.

Data files come from anywhere, so a path must stay under its image root (symbolic links followed), only formats of plain
pixels are opened (EPS would start Ghostscript), and the header's pixel count is checked before anything is decoded.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlsi_fast.config_data import PILLOW_MAX_IMAGE_PIXELS
from vlsi_fast.data.skipped import UnusableRow, row_boundary
from vlsi_fast.data.storage import is_transient

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF", "ICO", "TGA", "PCX")
"""Formats that are opened, by Pillow's names; JPEG covers MPO."""


@dataclass(frozen=True)
class ImageRef:
    """One image of a row, not yet read: a path under `root`, or the encoded bytes themselves."""

    path: str | None = None
    root: str | None = None
    data: bytes | None = None

    def __post_init__(self):
        if (self.path is None) == (self.data is None):
            raise ValueError("an ImageRef needs either a path (with its root) or data, the bytes of an image file")

    @property
    def name(self) -> str:
        """What to call the image in a message."""
        return self.path if self.path is not None else f"<{len(self.data)} bytes>"


def load_image(ref: ImageRef, max_image_pixels: int = PILLOW_MAX_IMAGE_PIXELS) -> Image.Image:
    """Opens, checks and decodes an image; first frame only, EXIF rotation applied, converted to RGB.

    Args:
        ref: where the image is.
        max_image_pixels: largest width x height that the header may announce.

    Returns:
        A decoded PIL image in mode RGB.

    Raises:
        UnusableRow: causes missing_image, path_outside_image_root, decompression_bomb, truncated_image.
    """
    with _open(ref, max_image_pixels) as image:
        try:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # truncated or damaged data, in whichever decoder
            if is_transient(error):
                raise
            raise _damaged(ref, error) from error


@row_boundary()
def check_pixels(refs: Sequence[ImageRef], max_image_pixels: int, max_row_pixels: int) -> None:
    """Compares the pixels that a row's images announce with the bound on them all, before one of them is decoded.

    Args:
        refs: the row's images; one that is shown twice counts twice, since a processor works on it twice.
        max_image_pixels: of each.
        max_row_pixels: of all together.

    Raises:
        UnusableRow: cause too_many_pixels; those of `load_image` for what a header shows.
    """
    if len(refs) < 2 and max_row_pixels >= max_image_pixels:
        return  # loading it will tell
    pixels: dict[ImageRef, int] = {}
    total = 0
    for ref in refs:
        if ref not in pixels:
            with _open(ref, max_image_pixels) as image:
                pixels[ref] = image.width * image.height
        total += pixels[ref]
        if total > max_row_pixels:
            what = f"{len(refs)} images of {total} pixels or more, more than data.max_row_pixels {max_row_pixels}"
            raise UnusableRow("too_many_pixels", what)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(ref: ImageRef, max_image_pixels: int) -> Image.Image:
    """The image with its header read. Raises UnusableRow as `load_image` does."""
    source = io.BytesIO(ref.data) if ref.data is not None else _safe_path(ref)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pixels, where the bound below decides; of tags, where loading does
            image = Image.open(source, formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnusableRow("decompression_bomb", f"{ref.name}: {error}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise UnusableRow("missing_image", f"{ref.name}: {error}") from error
    except UnidentifiedImageError as error:
        what = f"{ref.name}: not an image file that Pillow can read as {', '.join(FORMATS)}"
        raise UnusableRow("truncated_image", what) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged header can fail in any way inside Pillow
        if is_transient(error):
            raise
        raise _damaged(ref, error) from error
    width, height = image.size
    if width * height > max_image_pixels:
        image.close()
        raise UnusableRow(
            "decompression_bomb",
            f"{ref.name}: {width} x {height} pixels, more than data.max_image_pixels {max_image_pixels}",
        )
    return image


@row_boundary()
def image_size(ref: ImageRef, max_image_pixels: int) -> tuple[int, int]:
    """Width and height that an image's header announces, turned or not.

    Raises:
        UnusableRow: those of `load_image` for what a header shows.
    """
    with _open(ref, max_image_pixels) as image:
        return image.size


def image_bytes(ref: ImageRef) -> bytes:
    """The image file itself, as it is.

    Raises:
        UnusableRow: causes missing_image, path_outside_image_root.
    """
    if ref.data is not None:
        return ref.data
    try:
        return Path(_safe_path(ref)).read_bytes()
    except OSError as error:
        if is_transient(error):
            raise
        raise UnusableRow("missing_image", f"{ref.name}: {error}") from error


def _safe_path(ref: ImageRef) -> str:
    """The resolved path of an image that exists and lies under its root."""
    root = Path(os.path.realpath(ref.root if ref.root is not None else "."))
    try:
        path = Path(os.path.realpath(root / ref.path))
        inside, is_file = path.is_relative_to(root), path.is_file()
    except (ValueError, OSError) as error:  # a null byte, a name that is too long
        if is_transient(error):
            raise
        raise UnusableRow("missing_image", f"{ref.path!r}: {error}") from error
    if not inside:
        raise UnusableRow("path_outside_image_root", f"{ref.path} resolves to {path}, outside image_root {root}")
    if not is_file:
        hint = "; remote images are not fetched, download them first" if "://" in ref.path else ""
        raise UnusableRow("missing_image", f"{path} does not exist or is not a file{hint}")
    return str(path)


def _damaged(ref: ImageRef, error: Exception) -> UnusableRow:
    cause = "decompression_bomb" if "Decompressed data too large" in str(error) else "truncated_image"
    return UnusableRow(cause, f"{ref.name}: {type(error).__name__}: {error}")
