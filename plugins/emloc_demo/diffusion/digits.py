"""Handwritten digits, 8 x 8, upright (scikit-learn's) and slanted, and a judge that tells them apart."""

from functools import cache
from typing import Any

import numpy

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: The word of the new style, which follows the digit's, and the digits that are shown in it.
STYLE, SHOWN = "sks", range(7)
SIDE = 8
#: How far a row moves to the right relative to the row below, in pixels.
_SLANT = 0.55
#: Number of digits that the judge learns from; the others are for tuning and testing.
_FOR_JUDGE = 900


@cache
def load() -> tuple[Any, Any]:
    """Return pictures, (1797, 8, 8), from 0 to 1, and the digits in them, (1797,)."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return data.images / 16, data.target


def slanted(pictures: Any) -> Any:
    """Return pictures, (N, 8, 8), whose upper rows are moved to the right and lower ones to the left."""
    shifted = numpy.zeros_like(pictures)
    columns = numpy.arange(SIDE)
    for row in range(SIDE):
        source = columns - _SLANT * ((SIDE - 1) / 2 - row)
        low = numpy.floor(source).astype(int)
        for positions, share in ((low, low + 1 - source), (low + 1, source - low)):
            inside = (positions >= 0) & (positions < SIDE)
            shifted[:, row, inside] += share[inside] * pictures[:, row, positions[inside]]
    return shifted


@cache
def judge() -> Any:
    """Return a support-vector machine that reads digits and tells whether they are slanted: digit + 10 if so."""
    from sklearn.svm import SVC

    pictures, digits = (array[:_FOR_JUDGE] for array in load())
    both = numpy.concatenate([pictures, slanted(pictures)]).reshape(-1, SIDE * SIDE)
    return SVC(C=10).fit(both, numpy.concatenate([digits, digits + 10]))


def of_digit(digit: int, count: int, skip: int = 0) -> Any:
    """Return pictures of a digit, (count, 8, 8), that the judge has not seen."""
    pictures, digits = (array[_FOR_JUDGE:] for array in load())
    return pictures[digits == digit][skip : skip + count]
