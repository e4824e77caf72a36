"""Images of a row processed once where teacher's and student's image processors agree."""

from __future__ import annotations

import copy

_NAMES = ("processor_class", "_processor_class")
"""Settings of an image processor that say where it belongs, not what it does."""


class SharedImages:
    """An image processor that two processors use: the same images with the same options are worked on once.

    It keeps the last call alone, until `forget`. Everything but calls is the image processor's own.
    """

    def __init__(self, image_processor):
        self._image_processor, self._asked, self._made = image_processor, None, None

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_image_processor":  # looked up by copy and pickle before it is set
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images, *args, **options):
        """The image processor's result; a copy each, since a processor may take entries out of it."""
        if self._asked is None or not _same(self._asked, (images, args, options)):
            self._made = self._image_processor(images, *args, **options)
            self._asked = (images, args, options)
        return copy.copy(self._made)

    def forget(self) -> None:
        """Lets go of the images and tensors of the last call."""
        self._asked = self._made = None


def _same(one, other) -> bool:
    """Equal structure; images (all that is neither a container nor a plain value) by identity."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    plain = (str, int, float, bool, type(None))
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)


def same_images(first, second) -> bool:
    """Whether two processors turn images into the same tensors: same class of image processor, same settings."""
    one, other = first.image_processor, second.image_processor
    return type(one) is type(other) and _settings(one) == _settings(other)


def _settings(image_processor) -> dict:
    return {name: value for name, value in image_processor.to_dict().items() if name not in _NAMES}


def share_images(processors: dict) -> tuple[dict, SharedImages | None]:
    """Processors of two roles, on one image processor where theirs agree.

    Args:
        processors: role -> processor, two of them. They are left as they are.

    Returns:
        role -> processor: copies that share a `SharedImages`, and that; or the processors themselves, and None.
    """
    first, second = processors.values()
    if not same_images(first, second):
        return processors, None
    shared, copies = SharedImages(first.image_processor), {}
    for role, processor in processors.items():
        copies[role] = copy.copy(processor)
        copies[role].image_processor = shared
    return copies, shared
