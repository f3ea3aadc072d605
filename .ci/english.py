#!/usr/bin/env python3
"""Refuses turns of phrase that this project has dropped for plainer ones: ``python .ci/english.py [PATHS...]``.

Reads Markdown as it is, and of Python the comments and strings (docstrings, help, messages), and names of variables
that say nothing of what they hold. Exit code 1, and a line for each find, where there is any.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READ = {".py", ".md", ".jinja", ".toml", ".yaml", ".yml", ".ipynb"}
#: Text that is data or is generated from what is read anyway.
SKIPPED = (".ci/english.py", "registry/", "tests/fixtures/", "docs/settings.md")
UNIT = (
    "attempt|batch|block|card|check|column|command|device|digit|entry|epoch|expert|family|field|file|group|image|job|key|"
    "kind|layer|line|Linear|micro-batch|minute|model|module|node|parameter|picture|plugin|process|question|rank|row|run|"
    "sample|second|sequence|shard|stage|step|system|task|tensor|test|thread|tile|token|tower|unit|weight|worker"
)
MEASURE = (
    "batches|bits|bytes|driver time|images|likelihood|loss|milliseconds|ms|nats|NLL|once|operations|parameters|passes|"
    "processor time|rows|samples|seconds|steps|tiles|tokens|twice"
)
A = "(?-i:an?)"
NOUN = r"(?!(as|for|from|function|has|if|in|is|of|on|than|that|to|when|where|with|without)\b)\w{2,}"
#: A pattern, in which a space is any white space, and what to write.
PHRASES = {
    r"(go|goes|going|gone|went) on": "resume, continue",
    r"mend(s|ed|ing)?": "fix",
    r"anew|afresh": "again",
    r"wholly|altogether": "entirely, or nothing",
    r"whilst": "while",
    r"lest": "so that ... not",
    r"shall": "will",
    r"for ever": "forever",
    r"as yet": "yet",
    r"in the place of": "instead of, for",
    r"in (its|their) stead": "instead",
    r"(where|there)(of|in|upon)|hitherto|henceforth|whence|thence|hence|nought|betimes": "plain words",
    rf"(?<!many\x20)({MEASURE}) {A} ({UNIT})": "per",
    rf"one( {NOUN})? {A} ({UNIT})": "one ... per",
    rf"an? {NOUN} {A} ({UNIT})": "one ... per",
}
RULES = [
    (re.compile(rf"\b(?:{rule})\b".replace(" ", r"\s{1,4}"), re.IGNORECASE), advice) for rule, advice in PHRASES.items()
]
#: "Of the draw of rows." is no sentence.
STUB = re.compile(r"(^|(?<=[.:!?|]\s))Of (the|its|an?|all|any|each|every|more|that|those|two)\b", re.MULTILINE)
RULES.append((STUB, "a sentence, such as `Seed for drawing rows.`"))

#: Names of variables that would fit every one.
VAGUE = {"found", "made", "told", "said", "sought", "taken"}


def prose(path: Path) -> str:
    """Return a file's text; of Python comments and strings alone, each where it stands, all else blank."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    source = text.split("\n")
    lines = [[" "] * len(line) for line in source]
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            (first, start), (last, end) = token.start, token.end
            for number in range(first - 1, last):
                begin = start if number == first - 1 else 0
                stop = end if number == last - 1 else len(source[number])
                lines[number][begin:stop] = re.sub(r"[\"'`#]", " ", source[number][begin:stop])
    return "\n".join("".join(line) for line in lines)


def finds(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, phrase and advice for every phrase in a file that is refused."""
    text = re.sub(r"(?m)^ +", "", prose(path))
    for pattern, advice in RULES:
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), advice
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if name in VAGUE:
                    yield node.lineno, name, "what it holds"


def main(names: list[str]) -> int:
    """Check the files that are named, or all that git knows; return the exit code."""
    tracked = subprocess.run(["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = [name for name in tracked.splitlines() if Path(name).suffix in READ and not name.startswith(SKIPPED)]
    refused = [(name, *find) for name in wanted for find in sorted(finds(ROOT / name))]
    for name, line, phrase, advice in refused:
        sys.stdout.write(f"{name}:{line}: {phrase!r}: write {advice}\n")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
