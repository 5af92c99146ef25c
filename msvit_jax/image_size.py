"""Sizes of images and windows: a number of px for squares, (height, width) for rectangles."""

import numbers
from typing import Any, TypeAlias

ImageSize: TypeAlias = int | tuple[int, int]

WANTED = "one whole number of px (1 or more) or two as (height, width)"
_MOST = 2**31 - 1  # no array has a longer axis


def fits(value: Any) -> bool:
    """Tells whether a value is a size."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    whole = all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in sides)
    return len(sides) == 2 and whole and all(1 <= int(side) <= _MOST for side in sides)


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Returns (height, width) of a size."""
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def simplified(size: ImageSize) -> ImageSize:
    """Returns the same size as a number if it is a square, else as a tuple."""
    height, width = height_and_width(size)
    return height if height == width else (height, width)


def is_square(size: ImageSize) -> bool:
    """Tells whether both sides are equal."""
    height, width = height_and_width(size)
    return height == width


def shown(size: ImageSize) -> str:
    """Writes a size for messages, '64 px' or '48 x 64 px'."""
    sides = [simplified(size)] if is_square(size) else height_and_width(size)
    return f"{' x '.join(map(str, sides))} px"
