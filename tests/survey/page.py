"""The results of the survey, and the page that is written from them."""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from support.paths import DOCS, ROOT
from support.whole_run import CRASHED, REFUSED, RIGHT, WRONG

RESULTS = ROOT / "benchmarks" / "results" / "survey.jsonl"
PAGE = DOCS / "survey.md"
CLASSES = ("text", "image-text")
OTHER, MISSING = "no decoder", "package missing"
#: What refusals say of models that EMLoC is not for, and of those that could not be built here.
_SAY = {"is an encoder-decoder": OTHER, "neither a causal language model nor": OTHER,
        "was not found in your environment": MISSING}  # fmt: skip
#: What refusals say of encoders, and of decoders that read a prompt both ways: all with images, and some of text.
_ENCODER = "The logits of a token depend on later ones"
_BOTH_WAYS = ("cpmant", "xlnet")
#: What every refusal says.
_ALWAYS = ("and looking at it is not enough: ", "on a tiny model, ")
INTRODUCTION = """# Survey of architectures

Written by `make families-survey`. For every model type of transformers {version} with a class for causal
language models, or for images and text, it declares a tiny model by observing another one, and compresses, tunes,
corrects and merges it ({ways}). Each result is compared with a reference that streams nothing: ordinary forward
passes of the whole model, the paper's formulas, and the base patched by hand. A type is *right* if all stages agree,
*refused* if it is not compressed, with a reason, and *wrong* if results differ without a warning. Encoders and
encoder-decoders are *no decoder*.

The configs are their classes' defaults, plus what `tests/survey/configs.toml` adds if the defaults run no model. A
type runs again only when something changes for it, so results may be older than the code.
"""


def results() -> dict[str, dict[str, Any]]:
    """Return the last result of every model type, sorted by name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    rows = [json.loads(line) for line in lines]
    return dict(sorted({result["type"]: result for result in rows}.items()))


def outcome(result: Mapping[str, Any]) -> str:
    """Return the outcome that the page names; a way that is refused beside others that are right is no refusal."""
    name: str = result["outcome"]
    if name == REFUSED:
        is_encoder = result["class"] == "text" and result["type"] not in _BOTH_WAYS
        phrases = _SAY | ({_ENCODER: OTHER} if is_encoder else {})
        name = next((other for text, other in phrases.items() if text in result["why"]), REFUSED)
    return RIGHT if name == REFUSED and RIGHT in result.get("ways", {}).values() else name


def write() -> None:
    """Keep the last line of every model type, and write the page."""
    results_by_type = results()
    RESULTS.write_text("".join(json.dumps(result) + "\n" for result in results_by_type.values()))
    PAGE.write_text(page(results_by_type.values()))


def page(results_by_type: Iterable[Mapping[str, Any]]) -> str:
    """Return the page in Markdown."""
    rows = list(results_by_type)
    version = rows[0]["transformers"]
    ways = list(dict.fromkeys(way for result in rows for way in result.get("ways", ())))
    lines = [INTRODUCTION.format(version=version, ways="; ".join(ways))]
    columns = (RIGHT, REFUSED, WRONG, CRASHED, OTHER, MISSING)
    lines += [f"| class | types | {' | '.join(columns)} | right, of decoders |", f"| --- |{' ---: |' * 8}"]
    for name in CLASSES:
        counts = Counter(outcome(result) for result in rows if result["class"] == name)
        links = [f"[{counts[column]}](#{column}-{name})" if column in (REFUSED, WRONG, CRASHED) and counts[column]
                 else str(counts[column]) for column in columns]  # fmt: skip
        share = counts[RIGHT] / max(counts.total() - counts[OTHER], 1)
        lines.append(f"| {name} | {counts.total()} | {' | '.join(links)} | {share:.2f} |")
    for kind in (WRONG, CRASHED, REFUSED):
        for name in CLASSES:
            group = [result for result in rows if result["class"] == name and outcome(result) == kind]
            if group:
                lines += ["", f"## {kind.capitalize()}, {name}", ""]
                lines += [f"- `{result['type']}`: {_cell(result['why'])}" for result in group]
    right = [result for result in rows if outcome(result) == RIGHT]
    partly = {way: [result["type"] for result in right if result["ways"][way] != RIGHT] for way in ways}
    if any(partly.values()):
        lines += ["", "## Right, but refused in one way", ""]
        lines += [f"- {way}: {', '.join(types)}" for way, types in partly.items() if types]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    for phrase in _ALWAYS:
        text = text.replace(phrase, "")
    text = re.sub(r"^No plugin declares the model type '[^']*', ", "", text)
    text = re.sub(r"^The config of this '[^']*' cannot be shrunk to a tiny one: ", "cannot be shrunk: ", text)
    text = re.sub(r"Class validation error for validator '[^']*': |/tmp/\S+ |Could not run: |\b\w+Error: ", "", text)
    text = re.sub(r"(an image as the config describes it: )?The config of this '[^']*' ", "the config ", text)
    text = re.sub(r"No block of this '[^']*' holds", "no block holds", text)
    return textwrap.shorten(text.replace("|", "/").replace("<", "").replace(">", ""), 110, placeholder=" ...")
