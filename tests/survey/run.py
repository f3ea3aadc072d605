"""One model type: declared by looking, and run from compress to merge in every kind of emulator."""

import json
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.whole_run import CRASHED, REFUSED, RIGHT, WAYS, WRONG, Verdict, whole_run
from transformers import AutoConfig

from emloc_core.conformance.check import under_test
from emloc_core.conformance.inputs import as_sample, number_tokenizer, runnable, special_tokens, vocabulary
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.files.pretrained import new_model
from emloc_core.observed.look import observed, recorded
from emloc_core.observed.record import from_record
from emloc_core.scaffold.config_arguments import make_config
from emloc_core.scaffold.probe import probes

CONFIGS = Path(__file__).with_name("configs.toml")
#: Tokens of the rows of text: some are longer than the rows that a model is observed with.
LENGTHS = (13, 24, 40, 33)
#: Noise on initialised weights, and a seed that differs from the observed model's.
NOISE, SEED = 0.1, 3


def survey(name: str) -> dict[str, Any]:
    """Return a model type's outcome, why, the outcome of each way, and the seconds that observing took."""
    started = time.process_time()
    result: dict[str, Any] = {}
    try:
        config = _config(name)
        content = json.loads(config.to_json_string(use_diff=False))
        draft = observed(content)
        family = from_record(recorded(draft, content))
        result |= {"modality": family.modality, "looking": round(time.process_time() - started, 1)}
        with tempfile.TemporaryDirectory(prefix="emloc-survey-") as directory, under_test(family):
            verdicts = _in_all_ways(family, make_config(draft.family.tiny_configs[0]), Path(directory))
    except EmlocError as error:
        return {"outcome": REFUSED, "why": _line(error.args[0]), **result}
    except Exception as error:  # an unknown model's code
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        return {"outcome": CRASHED, "why": _line(why), **result}
    outcomes = [verdict.outcome for verdict in verdicts.values()]
    worst = next((kind for kind in (WRONG, CRASHED, REFUSED) if kind in outcomes), RIGHT)
    why = "; ".join(f"{way}: {verdict.why}" for way, verdict in verdicts.items() if verdict.outcome == worst != RIGHT)
    return {"outcome": worst, "why": _line(why), "ways": dict(zip(verdicts, outcomes, strict=True)), **result}


def _config(name: str) -> Any:
    """Return the default config of a model type, with what ``configs.toml`` adds."""
    try:
        return AutoConfig.for_model(name, **_settings().get(name, {}))
    except Exception as error:  # whatever the config class checks
        raise EmlocError(f"The defaults of its config describe no model: {error}") from error


@cache
def _settings() -> dict[str, Any]:
    """Return what is added to default configs that describe no model, by model type."""
    return tomllib.loads(CONFIGS.read_text())


def _in_all_ways(family: Family, config: Any, directory: Path) -> dict[str, Verdict]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: Any = new_model(family.auto_class, config, torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
    model.save_pretrained(directory / "base")
    number_tokenizer(config).save_pretrained(directory / "base")
    rows = [*_texts(config), *(_images(model, family) if family.modality == "image-text" else ())]
    samples = runnable(model, [as_sample(row, number) for number, row in enumerate(rows)])
    return {way: whole_run(directory / "base", samples, directory / way, **settings) for way, settings in WAYS.items()}


def _texts(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows of ordinary tokens."""
    longest = max(getattr(config.get_text_config(), "max_position_embeddings", None) or 0, 0) or max(LENGTHS)
    ordinary = torch.tensor(sorted(set(range(vocabulary(config))) - special_tokens(config.to_dict())))
    for seed, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(seed)
        yield {"input_ids": ordinary[torch.randint(len(ordinary), (1, min(length, longest)), generator=generator)]}


def _images(model: Any, family: Family) -> Iterator[Any]:
    """Yield the first row with an image that the model takes."""
    for name, make in probes(model, family):
        with suppress(Exception):  # inputs that are a guess
            inputs = make().inputs
            with torch.no_grad():
                output = model(**inputs, use_cache=False)
            if output.logits.shape[1] != inputs["input_ids"].shape[1]:
                continue
            if name != "text":
                yield inputs
            return


def _line(text: object) -> str:
    return " ".join(str(text).split())[:600]
