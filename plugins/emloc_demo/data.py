"""The demos' task: read a customer's message, write down its fields as JSON.

The fields are what a help desk files: who writes, the order or booking number, what it is about, what kind of request
it is (one of :data:`REQUESTS`), and the date it was bought or booked for. Four are copied from the message, the kind
has to be understood. Every message also holds numbers or dates that belong in no field.

``emloc demo-full`` asks for all five fields. ``emloc demo`` has shorter messages and asks for three, so that it ends
within minutes.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError

#: Keys of the answer, in this order; and of a short row's answer.
FIELDS = ("name", "number", "item", "request", "date")
SHORT_FIELDS = ("number", "item", "request")
INSTRUCTION = "Write the name, number, item, request and date of this message as JSON."
SHORT_INSTRUCTION = "Write the order's number, the item and the request as JSON."
#: The kinds of request; each with its wordings, of which the first half is for training and the rest for testing.
REQUESTS: dict[str, tuple[str, ...]] = {
    "late": (
        "It still has not arrived.",
        "It should have been here {ago} ago.",
        "I have been waiting {ago} longer than you promised.",
        "The parcel tracker has not moved for {ago}.",
        "Nothing has been delivered so far, {ago} after the promised day.",
        "After {ago} I am still waiting for the delivery.",
    ),
    "damaged": (
        "It arrived broken.",
        "There is a crack in it, {size} cm long.",
        "It was scratched when I opened the box.",
        "One side is dented and it no longer works.",
        "The box was crushed and what was inside is in pieces.",
        "It came with a tear of about {size} cm.",
    ),
    "wrong": (
        "You sent me {other} instead.",
        "The box held {other}, which I never asked for.",
        "I got {other} by mistake.",
        "What I unpacked is {other}.",
        "Instead of it there was {other} in the parcel.",
        "By some mix-up you delivered {other}.",
    ),
    "refund": (
        "I want my {price} back.",
        "Please return the {price} to my card.",
        "I sent it back {ago} ago, when will I get my money?",
        "Kindly refund the {price} that I paid.",
        "When do I get the {price} back that I paid for it?",
        "I returned it and would like the {price} on my account.",
    ),
    "cancel": (
        "Please cancel it, I no longer need it.",
        "I have changed my mind and do not want it any more.",
        "Can you stop this before it is sent?",
        "I would like to call it off.",
        "Kindly cancel it, we have found another for {price}.",
        "I do not need it any longer, so please call it off.",
    ),
}
_COLOURS = (
    ("black", "white", "blue", "grey", "green", "beech"),
    ("red", "silver", "brown", "yellow", "pink", "walnut"),
)
#: More colours for short training rows: after a few steps, a model that saw only six misspells others.
_MORE_COLOURS = ("orange", "purple", "golden", "cream", "copper", "oak", "beige", "violet", "turquoise", "maroon")
# fmt: off
_THINGS = (
    ("desk lamp", "office chair", "kettle", "rain jacket", "suitcase", "bookshelf", "tea set", "backpack", "toaster",
     "phone case", "picture frame", "sofa cover", "garden bench", "wall clock", "yoga mat", "bread bin"),
    ("floor lamp", "coffee table", "blender", "ski helmet", "travel bag", "shoe rack", "keyboard", "bath mat",
     "teapot", "bar stool", "wine rack", "bike light"),
)
# fmt: on
_OPENINGS = (
    "My name is {name} and I bought a {item} on {date}.",
    "On {date} I ordered a {item} from your shop. This is {name}.",
    "This is {name}, writing about the {item} that I paid for on {date}.",
    "{name} here. The {item} I am writing about was ordered on {date}.",
    "I am {name}. I placed an order for a {item} on {date}.",
)
_SHORT_OPENINGS = (
    "I bought a {item} on {date}.",
    "On {date} I ordered a {item}.",
    "It is about the {item} of {date}.",
    "A {item} was ordered on {date}.",
)
_NUMBERS = (
    "The order number is {number}.",
    "My order is {number}, not {old}, which came in {month}.",
    "You will find it under {number}.",
    "Order {number}; my customer number is {customer}.",
    "The confirmation says {number}.",
)
_REMARKS = (
    "You can call me on {phone}.",
    "I called on {later} and was told to write.",
    "I will be away from {later}.",
    "It cost {price}.",
    "I have shopped with you since {year}.",
    "Please answer before {later}.",
    "My postcode is {postcode}.",
)
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")


@dataclass(frozen=True)
class Split:
    """What one of the two files draws from; the two share nothing that is filled in."""

    names: Sequence[str]
    colours: Sequence[str]
    things: Sequence[str]
    wordings: dict[str, tuple[str, ...]]
    parity: int

    def row(self, draw: random.Random) -> dict[str, Any]:
        """Return one row ``{"messages": [user, assistant]}``: instruction and message, and the fields as JSON."""
        fields, fillings = self._draw(draw)
        middle = self._middle(fields["request"], draw)
        sentences = [draw.choice(_OPENINGS), *middle, draw.choice(_REMARKS)]
        user = {"role": "user", "content": f"{INSTRUCTION}\n\n{_filled(sentences, fillings)}"}
        return {"messages": [user, _answer(fields)]}

    def short_row(self, draw: random.Random) -> dict[str, Any]:
        """Return one row ``{"messages": [system, user, assistant]}``: instruction, message, three fields as JSON."""
        fields, fillings = self._draw(draw)
        middle = self._middle(fields["request"], draw)
        sentences = [draw.choice(_SHORT_OPENINGS), *middle]
        system = {"role": "system", "content": SHORT_INSTRUCTION}
        user = {"role": "user", "content": _filled(sentences, fillings)}
        return {"messages": [system, user, _answer({name: fields[name] for name in SHORT_FIELDS})]}

    def _draw(self, draw: random.Random) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the fields, and all that sentences may be filled with."""
        day, month = 2 * draw.randint(1, 12) - self.parity, draw.randrange(len(_MONTHS))
        request = draw.choice(sorted(self.wordings))
        item, other = draw.sample([f"{colour} {thing}" for colour in self.colours for thing in self.things], 2)
        fields = {
            "name": draw.choice(self.names),
            "number": self._number(draw),
            "item": item,
            "request": request,
            "date": f"{day} {_MONTHS[month]}",
        }
        return fields, {
            **fields,
            "other": f"a {other}",
            "old": self._number(draw),
            "ago": f"{draw.randint(2, 9)} {draw.choice(['days', 'weeks'])}",
            "size": draw.randint(2, 19),
            "price": f"{draw.randint(12, 290)} euros",
            "month": _MONTHS[month - 2],
            "later": f"{day + draw.randint(1, 4)} {_MONTHS[(month + 1) % len(_MONTHS)]}",
            "customer": draw.randint(1000, 9999),
            "phone": f"0{draw.randint(20, 79)} {draw.randint(1000, 9999)}",
            "year": draw.randint(2009, 2023),
            "postcode": draw.randint(10000, 99999),
        }

    def _middle(self, request: str, draw: random.Random) -> list[str]:
        """Return the sentences with the number and with the request, in any order."""
        sentences = [draw.choice(_NUMBERS), draw.choice(self.wordings[request])]
        if draw.random() < 0.5:
            sentences.reverse()
        return sentences

    def _number(self, draw: random.Random) -> str:
        """Return two letters and four digits. The parity of numbers and dates keeps the splits apart."""
        letters = "".join(draw.choices("ABCDEFGHKLMNPRSTUVWX", k=2))
        return f"{letters}-{draw.randint(100, 999)}{2 * draw.randint(0, 4) + self.parity}"


def _filled(sentences: Sequence[str], fillings: dict[str, Any]) -> str:
    return " ".join(sentence.format(**fillings) for sentence in sentences)


def _answer(fields: dict[str, str]) -> dict[str, str]:
    return {"role": "assistant", "content": json.dumps(fields, separators=(",", ":"))}


def splits(seed: int, *, short: bool = False) -> tuple[Split, Split]:
    """Return what the training rows and the test rows draw from: disjoint names, items, numbers and wordings.

    Raises:
        EmlocError: faker is missing.
    """
    try:
        from faker import Faker
    except ImportError:
        raise EmlocError("Making the demo's data needs the package faker.", "pip install 'emloc[demo]'") from None
    fake = Faker(["en_GB", "en_US", "en_IE"])
    fake.seed_instance(seed)
    first = sorted({fake.first_name() for _ in range(700)})
    last = sorted({fake.last_name() for _ in range(700)})
    draw = random.Random(seed)
    draw.shuffle(first)
    draw.shuffle(last)

    def split(index: int, count: int) -> Split:
        half = slice(index, None, 2)  # every second first name and last name: the two share neither
        names = [f"{a} {b}" for a, b in zip(first[half] * 8, draw.choices(last[half], k=8 * len(first)), strict=False)]
        wordings = {kind: texts[:4] if index == 0 else texts[4:] for kind, texts in REQUESTS.items()}
        colours = _COLOURS[index] + (_MORE_COLOURS if short and index == 0 else ())
        return Split(draw.sample(sorted(set(names)), count), colours, _THINGS[index], wordings, index)

    return split(0, 600), split(1, 200)


def make_rows(
    train: int = 600, test: int = 200, seed: int = 0, *, short: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training rows and test rows, the same for the same ``seed`` and versions of faker."""
    parts = splits(seed, short=short)
    draws = random.Random(f"train-{seed}"), random.Random(f"test-{seed}")
    rows = [
        [part.short_row(draw) if short else part.row(draw) for _ in range(n)]
        for part, draw, n in zip(parts, draws, (train, test), strict=True)
    ]
    return rows[0], rows[1]


def write_data(
    directory: str | Path, train: int = 600, test: int = 200, seed: int = 0, *, short: bool = False
) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``test.jsonl`` to ``directory``, each completely or not at all, and return their paths.

    The first three short rows for testing are in ``shown.jsonl`` too.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "test.jsonl"
    data = make_rows(train, test, seed, short=short)
    shown = [(directory / "shown.jsonl", data[1][:3])] if short else []
    for path, rows in [*shown, *zip(paths, data, strict=True)]:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.rename(partial, path)
    return paths
