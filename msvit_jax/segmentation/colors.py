"""Colors of classes in pictures and label maps."""

import numpy as np


def palette(classes: int) -> np.ndarray:
    """Returns distinct colors of classes, those of Pascal VOC's tools: [classes, 3] uint8."""
    colors = np.zeros((classes, 3), np.uint8)
    for number in range(classes):
        # Three bits of the number at a time become the high bits of red, green and blue.
        for bit in range(8):
            for channel in range(3):
                colors[number, channel] |= ((number >> (3 * bit + channel)) & 1) << (7 - bit)
    return colors
