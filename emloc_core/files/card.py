"""The card of an output: a README with its origin, how it was made, its scores, and how to load it.

It is a function of the manifest and of its inputs' manifests, so that a resumed run writes the same bytes. It has only
the last parts of paths, since cards are published.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emloc_core.errors import printable
from emloc_core.objective import Objective
from emloc_core.units import counted

CARD = "README.md"
#: The card of the model that a checkpoint was made from, in that checkpoint.
BASE_CARD = "BASE_README.md"
#: A repository's id: ``organisation/name``.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

Manifest = Mapping[str, Any]

#: Kind -> heading, library, relation to the base, and tags, in the hub's terms.
_KINDS = {
    "emulator": ("Emulator of {}", "transformers", None, []),
    "adapter": ("LoRA for {}", "peft", "adapter", ["lora"]),
    "corrected-adapter": ("LoRA for {}", "peft", "adapter", ["lora"]),
    "served-adapter": ("LoRA for {}", "peft", "adapter", ["lora"]),
    "comfyui": ("LoRA for {}, for ComfyUI", "diffusers", "adapter", ["lora"]),
    "gguf": ("{} for llama.cpp", "gguf", "quantized", ["gguf"]),
    "checkpoint": ("{}, tuned", "transformers", "finetune", []),
    "evaluation": ("Evaluation", None, None, []),
}


def data_name(source: Any) -> str:
    """Return a name for the source of rows: a hub id, the last part of a path, or that they were in memory.

    Several sources, a list of names or a mapping of their weights, are joined by commas.
    """
    weighted = isinstance(source, Mapping) and all(isinstance(weight, int | float) for weight in source.values())
    if (weighted or isinstance(source, list | tuple)) and source and all(isinstance(name, str) for name in source):
        return ", ".join(map(data_name, source))
    if not isinstance(source, str | Path):
        return "rows in memory"
    return str(source) if not Path(source).exists() and HUB_ID.fullmatch(str(source)) else Path(source).name


def card(
    manifest: Manifest,
    parents: Iterable[Manifest],
    loader: str,
    table: str | None = None,
    objective: Objective | None = None,
) -> str:
    """Return the card of an output in Markdown.

    Args:
        parents: manifests of the outputs that it was made from, the oldest first.
        loader: the class that loads the base.
        table: a table of scores, in Markdown.
        objective: what the base learns; None: tokens.
    """
    line = [*parents, manifest]
    base = next((name for parent in line if (name := _base(parent))), None)
    heading, library, relation, tags = _KINDS.get(manifest["kind"], ("{}", None, None, []))
    if objective and library == "transformers":
        library = objective.library
    title = heading.format(_display_name(base.rpartition("/")[2]) if base else "a model")
    if "source" in manifest["request"]:
        title = title.replace(", tuned", " in the layout of transformers")
    parts = [
        _front_matter(base, library, relation, tags),
        f"# {title}\n",
        "Made by EMLoC, which tunes a LoRA on an emulator of a model, a smaller stand-in, and carries it over to the "
        "model (arXiv 2506.12015).\n",
        f"## How it was made\n\n{steps}" if (steps := "".join(_provenance(line, base))) else "",
        *_scores(line, table),
        *_use(manifest, line, base, loader, objective),
        f"`emloc.json` has every setting, the versions, and fingerprints of all inputs.{_licence(manifest)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _base(manifest: Manifest) -> str | None:
    """Return the name of a stage's base: a hub id, or a path."""
    inputs = manifest.get("inputs") or {}
    name = inputs.get("base") or inputs.get("source") or inputs.get("model")
    return name if isinstance(name, str) else None


def _display_name(name: str) -> str:
    """Return a hub id, or the last part of a path, safe to put into Markdown."""
    text = name if HUB_ID.fullmatch(name) else Path(name).name
    return printable(text).replace("`", "'")


def _front_matter(base: str | None, library: str | None, relation: str | None, tags: list[str]) -> str:
    lines = []
    if base and HUB_ID.fullmatch(base):
        lines.append(f"base_model: {base}")
        lines += [f"base_model_relation: {relation}"] if relation else []
    lines += [f"library_name: {library}"] if library else []
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in ["emloc", *tags]), "---", ""])


def _provenance(line: list[Manifest], base: str | None) -> Iterator[str]:
    """Yield a line of Markdown per stage: its own words on how its output was made."""
    if base:
        yield f"- Base: `{_display_name(base)}`.\n"
    for manifest in line:
        provenance = manifest.get("made")
        if isinstance(provenance, str) and provenance:
            rows = (manifest.get("inputs") or {}).get("data")
            source = f" Rows from `{_display_name(rows)}`." if isinstance(rows, str) else ""
            yield f"- {printable(provenance)}{source}\n"


def _scores(line: list[Manifest], table: str | None) -> Iterator[str]:
    if table:
        yield f"## Scores\n\n{table}"
    candidates = filter(None, ((manifest.get("result") or {}).get("candidates") for manifest in reversed(line)))
    if compared := next(candidates, None):
        yield (
            "## Scores\n\nLoss per token, in nats, of the base with the corrected LoRA on "
            f"{counted(compared[0]['rows'], 'held-out row')}; clamp 0 at scale 1 is the LoRA as it was tuned.\n\n"
            "| clamp | scale | loss |\n| --- | ---: | ---: |\n"
            + "".join(f"| {row['clamp']} | {row['scale']:g} | {row['nll']:.4f} |\n" for row in compared)
        )


def _use(
    manifest: Manifest, line: list[Manifest], base: str | None, loader: str, objective: Objective | None
) -> Iterator[str]:
    kind = manifest["kind"]
    load = f'{loader}.from_pretrained("{{}}", dtype="auto")'
    if kind == "gguf":
        options = "--model BASE.gguf --lora adapter.gguf" if "adapter" in manifest["request"] else "--model model.gguf"
        yield f"## Use it\n\n```sh\nllama-server {options}\n```\n"
    if kind not in ("emulator", "checkpoint") and "adapter" not in kind:
        return
    if kind == "adapter" and "adapter" not in manifest["request"] and any(item["kind"] == "emulator" for item in line):
        yield (
            "It was tuned on the emulator. `emloc correct DIRECTORY -o corrected` carries it over to the base, which "
            "is what it is for.\n"
        )
        return
    if objective and (own := objective.usage(kind, loader, _display_name(base) if base else "BASE")):
        yield f"## Use it\n\nWith this directory, or its hub id, as `DIRECTORY`:\n\n```python\n{own}\n```\n"
        return
    imports = [f"from transformers import {loader}, AutoTokenizer\n"]
    if kind == "emulator":
        imports.insert(0, "import emloc_core.standins.quantizer  # from_pretrained then loads emulators")
    code = [f"model = {load.format('DIRECTORY')}"]
    if "adapter" in kind:
        imports.insert(0, "from peft import PeftModel")
        code = [f"base = {load.format(_display_name(base) if base else 'BASE')}"]
        code.append('model = PeftModel.from_pretrained(base, "DIRECTORY")')
    code.append('tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")')
    snippet = "\n".join([*imports, *code])
    yield f"## Use it\n\nWith this directory, or its hub id, as `DIRECTORY`:\n\n```python\n{snippet}\n```\n"
    yield "`emloc chat DIRECTORY` talks to it.\n"


def _licence(manifest: Manifest) -> str:
    if manifest["kind"] not in ("emulator", "checkpoint"):
        return ""
    return f" The base's own card, if it has one, is `{BASE_CARD}`; its licence holds for this directory too."
