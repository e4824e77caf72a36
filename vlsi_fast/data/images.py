"""Images of a row: where they are, and loading them with care.

Data files come from anywhere, so a path must stay under its image root (symbolic links followed), and the header's
pixel count is checked before anything is decoded.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlsi_fast.data.skipped import UnusableRow

PILLOW_MAX_IMAGE_PIXELS = 178956970
"""Pixels above which Pillow itself refuses to open an image (twice its warning limit)."""


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
    source = io.BytesIO(ref.data) if ref.data is not None else _safe_path(ref)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below decides
            image = Image.open(source)
    except Image.DecompressionBombError as error:
        raise UnusableRow("decompression_bomb", f"{ref.name}: {error}") from error
    except (FileNotFoundError, PermissionError) as error:
        raise UnusableRow("missing_image", f"{ref.name}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnusableRow("truncated_image", f"{ref.name}: not an image file that Pillow can read") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged header can fail in any way inside Pillow
        raise _damaged(ref, error) from error
    with image:
        width, height = image.size
        if width * height > max_image_pixels:
            raise UnusableRow(
                "decompression_bomb",
                f"{ref.name}: {width} x {height} pixels, more than data.max_image_pixels {max_image_pixels}",
            )
        try:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # truncated or damaged data, in whichever decoder
            raise _damaged(ref, error) from error


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
        raise UnusableRow("missing_image", f"{ref.name}: {error}") from error


def _safe_path(ref: ImageRef) -> str:
    """The resolved path of an image that exists and lies under its root."""
    root = Path(os.path.realpath(ref.root if ref.root is not None else "."))
    try:
        path = Path(os.path.realpath(root / ref.path))
        inside, is_file = path.is_relative_to(root), path.is_file()
    except (ValueError, OSError) as error:  # a null byte, a name that is too long
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
