"""Pictures of real handwritten digits, and questions about them.

A picture has two to four of scikit-learn's 8x8 digits, enlarged and in different colours, somewhere on a grid of three
by three. Each of the 1797 digits belongs to exactly one part: to the base model's pretraining, or to the rows of one of
the sets that adapt and test it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError

if TYPE_CHECKING:
    import numpy

    Pixels = numpy.ndarray[Any, numpy.dtype[numpy.uint8]]

CELL, GRID = 16, 3
#: How many digits a picture has.
FEWEST, MOST = 2, 4
#: Height and width of a picture, in pixels.
SIDE = CELL * GRID
COLOURS = {"red": (255, 64, 64), "green": (64, 255, 64), "blue": (80, 112, 255), "yellow": (255, 240, 64)}
#: Questions that the base model learns to answer, by kind.
QUESTIONS = {
    "read": "Which digits are there?",
    "count": "How many digits are there?",
    "colour": "Which digit is {colour}?",
    "inverse": "What colour is the {digit}?",
}
#: The question that it is adapted to.
NEW_QUESTION = "Which digits are there, the smallest first?"

#: Degrees by which pretraining turns the digits: real ones are few.
TURNS = (0.0, -12.0, -6.0, 6.0, 12.0)


@dataclass(frozen=True)
class Digits:
    """Real digits: ``strokes`` uint8 ``[variants, digits, CELL, CELL]``, brightness; ``values`` int ``[digits]``.

    The variants show the same digits, each turned by another angle.
    """

    strokes: "Pixels"
    values: "numpy.ndarray[Any, Any]"

    def __len__(self) -> int:
        return len(self.values)

    def subset(self, indices: "Sequence[int] | numpy.ndarray[Any, Any]") -> "Digits":
        """Return only the digits at these indices."""
        return Digits(self.strokes[:, indices], self.values[indices])


@dataclass(frozen=True)
class Picture:
    """A picture: ``pixels`` uint8 ``[SIDE, SIDE, 3]``; its digits, their colours and cells, in reading order."""

    pixels: "Pixels"
    digits: tuple[int, ...]
    colours: tuple[str, ...]
    cells: tuple[int, ...]

    def answer(self, question: str) -> str:
        """Return the right answer to :data:`NEW_QUESTION` or the question ``read``."""
        return " ".join(map(str, sorted(self.digits) if question == NEW_QUESTION else self.digits))

    def questions(self) -> list[tuple[str, str]]:
        """Return everything that the base model can be asked about the picture, with the answers."""
        pairs = [(QUESTIONS["read"], self.answer(QUESTIONS["read"])), (QUESTIONS["count"], str(len(self.digits)))]
        for digit, colour in zip(self.digits, self.colours, strict=True):
            pairs.append((QUESTIONS["colour"].format(colour=colour), str(digit)))
            if self.digits.count(digit) == 1:
                pairs.append((QUESTIONS["inverse"].format(digit=digit), colour))
        return pairs


def load_digits(turns: Sequence[float] = (0,)) -> Digits:
    """Return scikit-learn's digits, all 1797, enlarged to a cell.

    Args:
        turns: degrees by which each variant is turned.

    Raises:
        EmlocError: scikit-learn or pillow is missing.
    """
    try:
        import numpy
        from PIL import Image
        from sklearn import datasets
    except ImportError as error:
        raise EmlocError(f"Making the demo's pictures needs {error.name}.", "pip install 'emloc[demo]'") from None
    images, values = datasets.load_digits(return_X_y=True)

    def enlarge(image: Any, turn: float) -> Any:
        small = Image.fromarray((image.reshape(8, 8) * 255 / 16).astype(numpy.uint8))
        large = small.resize((CELL, CELL), Image.Resampling.BICUBIC)
        return numpy.asarray(large.rotate(turn, Image.Resampling.BICUBIC))

    return Digits(numpy.stack([[enlarge(image, turn) for image in images] for turn in turns]), values)


def compose(digits: Digits, indices: Sequence[int], draw: "numpy.random.Generator") -> Picture:
    """Put the digits at ``indices`` into random cells, in random colours and variants."""
    import numpy

    count = len(indices)
    pixels = numpy.zeros((SIDE, SIDE, 3), dtype=numpy.uint8)
    cells = numpy.sort(draw.choice(GRID * GRID, count, replace=False))
    colours = [list(COLOURS)[index] for index in draw.choice(len(COLOURS), count, replace=False)]
    variants = draw.integers(len(digits.strokes), size=count)
    for index, cell, colour, variant in zip(indices, cells, colours, variants, strict=True):
        top, left = CELL * (cell // GRID), CELL * (cell % GRID)
        strokes = digits.strokes[variant, index].astype(numpy.uint16)
        pixels[top : top + CELL, left : left + CELL] = strokes[..., None] * numpy.array(COLOURS[colour]) // 255
    return Picture(
        pixels, tuple(int(digits.values[index]) for index in indices), tuple(colours), tuple(map(int, cells))
    )
