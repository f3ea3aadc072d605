"""The rows of three tasks of different kinds: extraction to JSON, classification of real text, word problems.

Each task gives four sets of rows, none of which is in another: calibration, tuning and selection, drawn again for every
seed, and test rows, the same for all seeds. Rows have at most some 130 tokens of SmolLM2.
"""

import hashlib
import io
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from emloc_demo.data import INSTRUCTION, make_rows

SIZES = {"calibration": 64, "selection": 64, "tuning": 640}
#: Calibration rows more, for kinds that take as many.
FURTHER = 192
TEST = 160
#: Sets of rows that no LoRA is tuned for, of 48 each; the second is the test rows of another task.
UNRELATED = {"general": "general text", "extraction": "extraction"}
Row = dict[str, Any]
#: Python package whose source archive carries rated sentences (Hutto and Gilbert, 2014: VADER; MIT licence).
RATED = "vaderSentiment==3.3.2"
_SOURCES = {
    "amazonReviewSnippets": "product review",
    "movieReviewSnippets": "film review",
    "nytEditorialSnippets": "newspaper",
    "tweets": "tweet",
}
_FEELINGS = {"negative": (-4.0, -1.0), "neutral": (-0.4, 0.4), "positive": (1.5, 4.0)}


def make_sets(task: str, seed: int, directory: Path, tuning: int = SIZES["tuning"]) -> dict[str, list[Row]]:
    """Return the rows of a task: ``calibration``, ``selection``, ``tuning`` and ``test``.

    Kinds that are calibrated on fewer rows take the first of these.

    Args:
        task: a key of :data:`TEXTS`.
        seed: of the draw of all sets but ``test``.
        directory: where downloaded archives are kept.
        tuning: how many rows to tune on, if there are as many; the usual ones are the first.
    """
    pool, test = TEXTS[task](directory)
    test = distinct(test)[:TEST]
    pool = without(distinct(pool), test)
    random.Random(f"{task}-{seed}").shuffle(pool)
    if len(pool) < sum(SIZES.values()) + FURTHER or len(test) < TEST:
        sys.exit(f"The task {task} has {len(pool)} rows for tuning and {len(test)} for testing: too few.")
    sets, start = {"test": test}, 0
    for name, size in SIZES.items():
        sets[name] = pool[start : start + size]
        start += size
    sets["calibration"] += pool[start : start + FURTHER]
    sets["tuning"] += pool[start + FURTHER :][: tuning - SIZES["tuning"]]
    return sets


def conversation(instruction: str, question: str, answer: str) -> Row:
    """Return a row of TRL's conversational form."""
    texts = {"system": instruction, "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in texts.items()]}


def without_chat(row: Row) -> Row:
    """Return a conversation as a prompt and its completion, for models without a chat template; text as it is."""
    if "messages" not in row:
        return row
    instruction, user, answer = (message["content"] for message in row["messages"])
    return {"prompt": f"{instruction}\n\n{user}\n\n", "completion": answer}


def question(row: Row) -> str:
    """Return what makes two rows the same: the question, whatever the answer."""
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Return the rows without those whose question was asked before."""
    return list({question(row): row for row in reversed(list(rows))}.values())[::-1]


def without(rows: Iterable[Row], others: Iterable[Row]) -> list[Row]:
    """Return the rows whose question is in none of the others."""
    questions = {question(row) for row in others}
    return [row for row in rows if question(row) not in questions]


def extraction(_directory: Path) -> tuple[list[Row], list[Row]]:
    """Customers' messages to JSON: the demo's rows. Test rows share no name, item or wording with the others."""
    train, test = make_rows(2000, 2 * TEST)

    def short(row: Row) -> Row:  # the instruction in place of the chat template's own system prompt
        user, answer = (message["content"] for message in row["messages"])
        return conversation(INSTRUCTION, user.removeprefix(INSTRUCTION).strip(), answer)

    return [short(row) for row in train], [short(row) for row in test]


def classification(directory: Path) -> tuple[list[Row], list[Row]]:
    """Sentences from reviews, a newspaper and tweets: where from, and how they feel, as twenty readers rated them.

    All pairs of source and feeling are as frequent.
    """
    groups = [
        [row for row in read_rated(archive, source) if row[1] == feeling]
        for archive in [rated_archive(directory)]
        for source in _SOURCES
        for feeling in _FEELINGS
    ]
    size = min(200, *map(len, groups))
    rows = []
    for group in groups:
        ordered = sorted(group, key=lambda row: hashlib.sha256(row[0].encode()).digest())
        rows += ordered[:size]
    rows.sort(key=lambda row: hashlib.sha256(f"order {row[0]}".encode()).digest())
    conversations = [conversation("Name the source and the feeling of this text.", text, f"{source}, {feeling}")
                     for text, feeling, source in rows]  # fmt: skip
    return conversations[2 * TEST :], conversations[: 2 * TEST]


def general_text(directory: Path) -> list[str]:
    """Return the rated sentences of all sources, in an order that is always the same."""
    archive = rated_archive(directory)
    sentences = [text for source in _SOURCES for text, _, _ in read_rated(archive, source)]
    return sorted(sentences, key=lambda text: hashlib.sha256(text.encode()).digest())


def rated_archive(directory: Path) -> bytes:
    """Return the inner archive of the rated sentences; the package's source archive is downloaded once."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
               "--dest", str(directory), RATED]  # fmt: skip
    archives = sorted(directory.glob("vader*.tar.gz"))
    if not archives:
        subprocess.run(command, check=True)
        archives = sorted(directory.glob("vader*.tar.gz"))
    with tarfile.open(archives[0]) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None
        return inner.read()


def read_rated(archive: bytes, source: str) -> list[tuple[str, str, str]]:
    """Return (text, feeling, source) of a source's sentences of 4 to 40 words, without those rated between feelings."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        name = next(name for name in inner.getnames() if name.endswith(f"{source}_GroundTruth.txt"))
        file = inner.extractfile(name)
        assert file is not None
        lines = file.read().decode("utf-8", "replace").splitlines()
    sentences = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        feeling = next((name for name, (low, high) in _FEELINGS.items() if low <= float(rating) <= high), None)
        if feeling and 4 <= len(text.split()) <= 40:
            sentences.append((text.strip(), feeling, _SOURCES[source]))
    return sentences


_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo", "Mia", "Nils", "Ola")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "plums", "shells", "stamps", "stickers")


def arithmetic(_directory: Path) -> tuple[list[Row], list[Row]]:
    """Word problems of two or three steps, answered step by step."""
    draw = random.Random("arithmetic")
    rows = distinct(_problem(draw) for _ in range(4000))
    return rows[2 * TEST :], rows[: 2 * TEST]


def _problem(draw: random.Random) -> Row:
    a, b = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    many, few, boxes, friends = (draw.randint(*limits) for limits in ((210, 990), (13, 97), (12, 48), (3, 9)))
    each, price = draw.randint(13, 39), draw.randint(6, 29)

    def steps(*parts: str) -> str:
        return ". ".join(parts) + "."

    total = boxes * each
    kinds = [
        (f"{a} has {boxes} boxes with {each} {thing} in each. {b} gives {a} {few} more. How many {thing} does {a} have "
         "now?", steps(f"{boxes} x {each} = {total}", f"{total} + {few} = {total + few}")),
        (f"{a} fills {boxes} bags with {each} {thing} each and gives {few} of them to {b}. How many {thing} are left?",
         steps(f"{boxes} x {each} = {total}", f"{total} - {few} = {total - few}")),
        (f"{a} had {many} {thing}. {a} lost {few} and then found {each}. How many {thing} does {a} have?",
         steps(f"{many} - {few} = {many - few}", f"{many - few} + {each} = {many - few + each}")),
        (f"{a} has {few} {thing}, and {b} has {friends} times as many. How many {thing} do they have together?",
         steps(f"{friends} x {few} = {friends * few}", f"{friends * few} + {few} = {friends * few + few}")),
        (f"{friends} friends share {friends * few} {thing} equally. {a} is one of them and buys {each} more. How many "
         f"does {a} have?", steps(f"{friends * few} / {friends} = {few}", f"{few} + {each} = {few + each}")),
        (f"One of the {thing} costs {price} euros. {a} buys {boxes} and {b} buys {few}. How much do they pay together?",
         steps(f"{boxes} + {few} = {boxes + few}", f"{boxes + few} x {price} = {(boxes + few) * price}")),
        (f"{a} buys {boxes} {thing} at {price} euros each and pays with {boxes * price + few} euros. {b} then gives "
         f"{a} {each} euros. How much of that is left?",
         steps(f"{boxes} x {price} = {boxes * price}", f"{boxes * price + few} - {boxes * price} = {few}",
               f"{few} + {each} = {few + each}")),
    ]  # fmt: skip
    return conversation("Work it out step by step.", *draw.choice(kinds))


def unrelated(directory: Path) -> dict[str, list[Row]]:
    """Return rows that a LoRA for word problems is not tuned for: general text to continue, and messages to extract."""
    sentences = (text.split(maxsplit=2) for text in general_text(directory)[-48:])
    general = [{"prompt": f"{first} {second}", "completion": f" {rest}"} for first, second, rest in sentences]
    return dict(zip(UNRELATED, (general, distinct(extraction(directory)[1])[:48]), strict=True))


#: What makes the rows of a task: those to draw from, and those for testing.
TEXTS: dict[str, Callable[[Path], tuple[list[Row], list[Row]]]] = {
    "extraction": extraction,
    "classification": classification,
    "arithmetic": arithmetic,
}
