"""The words of the small world, and what they stand for."""

from __future__ import annotations

import math

from PIL import ImageColor

# red, green and blue of each, 0 to 255; on a dark ground all differ
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 220, 50),
    "white": (245, 245, 245),
    "orange": (245, 140, 30),
    "purple": (150, 60, 200),
    "pink": (250, 150, 195),
    "cyan": (60, 215, 220),
    "brown": (150, 90, 45),
}
SHAPES: tuple[str, ...] = (
    *("circle", "square", "triangle", "star", "cross", "ring"),
    *("diamond", "heart", "arrow", "moon", "drop", "house"),
)
NUMBERS = ("one", "two", "three", "four", "five", "six")
# where a thing is: its centre in widths of the picture from the left and from the top
PLACES = {
    "left": (0.2, 0.5),
    "right": (0.8, 0.5),
    "top": (0.5, 0.2),
    "bottom": (0.5, 0.8),
    "middle": (0.5, 0.5),
}
# the way a thing moves: columns to the right and rows down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EFFECTS = ("bell", "drum", "whistle", "buzzer")
# drawn in a video, or said in it
SIGNS = ("dog", "cat", "horse", "bird", "rabbit", "sheep", "duck", "lion", "tiger", "monkey")
OPPOSITES = (
    ("big", "small"),
    ("old", "new"),
    ("hot", "cold"),
    ("fast", "slow"),
    ("loud", "quiet"),
    ("light", "heavy"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

NAMES = ("Alice", "Ben", "Clara", "David", "Emma", "Frank")
# those of which there are lists
WORDS = (*COLOURS, *SHAPES, *NUMBERS, *PLACES, *EFFECTS, *SIGNS, *sum(OPPOSITES, ()), *DAYS, *NAMES)


def nearest_colour(colour: str) -> str:
    """The name of the colour that is nearest to one of #rrggbb."""
    parts = ImageColor.getrgb(colour)
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], parts))


def plural(shape: str, count: int) -> str:
    """The name of a shape for a number of it."""
    if count == 1:
        return shape
    return shape + ("es" if shape.endswith("ss") else "s")
