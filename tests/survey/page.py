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
#: What refusals say of encoders, and of decoders that read a prompt both ways: of all with images, and of some of text.
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
    found = [json.loads(line) for line in lines]
    return dict(sorted({result["type"]: result for result in found}.items()))


def outcome(result: Mapping[str, Any]) -> str:
    """Return the outcome that the page names; a way that is refused beside others that are right is no refusal."""
    found: str = result["outcome"]
    if found == REFUSED:
        is_encoder = result["class"] == "text" and result["type"] not in _BOTH_WAYS
        said = _SAY | ({_ENCODER: OTHER} if is_encoder else {})
        found = next((other for text, other in said.items() if text in result["why"]), REFUSED)
    return RIGHT if found == REFUSED and RIGHT in result.get("ways", {}).values() else found


def write() -> None:
    """Keep the last line of every model type, and write the page."""
    found = results()
    RESULTS.write_text("".join(json.dumps(result) + "\n" for result in found.values()))
    PAGE.write_text(page(found.values()))


def page(found: Iterable[Mapping[str, Any]]) -> str:
    """Return the page in Markdown."""
    known = list(found)
    version = known[0]["transformers"]
    ways = list(dict.fromkeys(way for result in known for way in result.get("ways", ())))
    lines = [INTRODUCTION.format(version=version, ways="; ".join(ways))]
    columns = (RIGHT, REFUSED, WRONG, CRASHED, OTHER, MISSING)
    lines += [f"| class | types | {' | '.join(columns)} | right, of decoders |", f"| --- |{' ---: |' * 8}"]
    for name in CLASSES:
        counts = Counter(outcome(result) for result in known if result["class"] == name)
        links = [f"[{counts[each]}](#{each}-{name})" if each in (REFUSED, WRONG, CRASHED) and counts[each]
                 else str(counts[each]) for each in columns]  # fmt: skip
        share = counts[RIGHT] / max(counts.total() - counts[OTHER], 1)
        lines.append(f"| {name} | {counts.total()} | {' | '.join(links)} | {share:.2f} |")
    for each in (WRONG, CRASHED, REFUSED):
        for name in CLASSES:
            those = [result for result in known if result["class"] == name and outcome(result) == each]
            if those:
                lines += ["", f"## {each.capitalize()}, {name}", ""]
                lines += [f"- `{result['type']}`: {_cell(result['why'])}" for result in those]
    right = [result for result in known if outcome(result) == RIGHT]
    partly = {way: [result["type"] for result in right if result["ways"][way] != RIGHT] for way in ways}
    if any(partly.values()):
        lines += ["", "## Right, but refused in one way", ""]
        lines += [f"- {way}: {', '.join(types)}" for way, types in partly.items() if types]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    for told in _ALWAYS:
        text = text.replace(told, "")
    text = re.sub(r"^No plugin declares the model type '[^']*', ", "", text)
    text = re.sub(r"^The config of this '[^']*' cannot be shrunk to a tiny one: ", "cannot be shrunk: ", text)
    text = re.sub(r"Class validation error for validator '[^']*': |/tmp/\S+ |Could not run: |\b\w+Error: ", "", text)
    text = re.sub(r"(an image as the config describes it: )?The config of this '[^']*' ", "the config ", text)
    text = re.sub(r"No block of this '[^']*' holds", "no block holds", text)
    return textwrap.shorten(text.replace("|", "/").replace("<", "").replace(">", ""), 110, placeholder=" ...")
