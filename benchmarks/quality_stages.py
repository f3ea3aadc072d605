"""The stages of the toolkit as ``quality.py`` runs them, what they take, and the loss of what they give."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quality_cells import ATTENTION, BATCH, EXACT, RSLORA, Cell

from emloc_core.files.meter import Meter


class Metered:
    """Runs stages, and keeps what each took: seconds, and the process's peak memory meanwhile."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}

    def __call__(self, stage: str, function: Callable[[], Any], output: Path | None = None) -> Any:
        """Call a function without arguments as a stage; where its output is there, read there what it took."""
        if output and output.exists():
            timing = json.loads((output / "timing.json").read_text())
            self.stages[stage] = {name: timing[name] for name in ("seconds", "peak_rss_bytes")}
            return output
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
        meter = Meter()
        value = function()
        reading = meter.read()
        self.stages[stage] = {name: reading[name] for name in ("seconds", "peak_rss_bytes")}
        return value


def trained(
    model: Path, output: Path, cell: Cell, rows: dict[str, Path], metered: Metered, *, exact: bool = False
) -> Path:
    """Tune a LoRA on a model by ordinary steps, or by exact ones; return its directory."""
    from emloc_core.requests import TrainRequest
    from emloc_core.settings import TrainSettings
    from emloc_core.tuning.exact import prepare

    options: dict[str, Any] = {"gradient_checkpointing": False, "logging_steps": 1, "lora_rank": cell.rank,
                               "lora_alpha": 2 * cell.rank, "batch_size": cell.batch}  # fmt: skip
    if cell.targets == ATTENTION:
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    options["use_rslora"] = cell.scaling == RSLORA
    settings = TrainSettings(steps=cell.steps, learning_rate=cell.learning_rate, seed=cell.seed, **options)
    request = TrainRequest(model=str(model), data=str(rows["tuning"]), output=output, exact=exact, settings=settings)
    return metered("train", lambda: prepare(request).run(), output)


def corrected(adapter: Path, base: Path, rows: dict[str, Path], clamp: float | str, output: Path) -> Path:
    """Carry a LoRA over to the base; return its directory."""
    from emloc_core.adapters.correct import prepare
    from emloc_core.requests import CorrectRequest
    from emloc_core.settings import CorrectSettings

    arguments = {"adapter": adapter, "base": str(base), "output": output, "settings": CorrectSettings(clamp=clamp)}
    if clamp == "auto":
        arguments["selection_data"] = rows["selection"]
    return prepare(CorrectRequest(**arguments)).run()


def polish(
    cell: Cell, adapter: Path, base: Path, rows: dict[str, Path], metered: Metered
) -> tuple[float, dict[str, Path]]:
    """Take exact steps from an adapter; return their learning rate, and the results by name.

    The rate is half of that of tuning, or a quarter: the better of the two by the loss on the selection rows.
    """
    selection = Scores(base, rows["selection"])

    def steps(count: int, rate: float) -> Path:
        output = adapter.with_name(f"polish{count}-{rate:g}")
        return metered(f"polish{count}", lambda: polished(adapter, base, rows, count, rate, cell.seed, output))

    *fewer, most = EXACT
    # Stages with as many steps share a name: what the last one took is kept.
    tried = {rate: steps(most, rate) for rate in (cell.learning_rate / 2, cell.learning_rate / 4)}
    rate = min(tried, key=lambda rate: selection.measure(tried[rate])["nll"])
    adapters = {most: tried[rate]} | {count: steps(count, rate) for count in fewer}
    return rate, {f"polish{count}": path for count, path in sorted(adapters.items())}


def polish_once(cell: Cell, adapter: Path, base: Path, rows: dict[str, Path], metered: Metered) -> Path:
    """Take 20 exact steps from an adapter at half of its rate; return the directory of the LoRA."""
    exact, rate = adapter.with_name("polish"), cell.learning_rate / 2
    return metered("polish20", lambda: polished(adapter, base, rows, EXACT[-1], rate, cell.seed, exact), exact)


def polished(
    adapter: Path,
    base: Path,
    rows: dict[str, Path],
    steps: int,
    rate: float,
    seed: int,
    output: Path,
    *,
    batch: int = BATCH,
) -> Path:
    """Take exact steps from an adapter, of ``batch`` rows each; return the directory of the LoRA."""
    from emloc_core.requests import PolishRequest
    from emloc_core.settings import PolishSettings
    from emloc_core.tuning.exact import prepare

    settings = PolishSettings(
        steps=steps,
        learning_rate=rate,
        seed=seed + 1000,  # other rows first than in tuning
        batch_size=BATCH,
        accumulation=batch // BATCH,
    )
    paths = {"adapter": adapter, "base": str(base), "output": output}
    return prepare(PolishRequest(**paths, data=str(rows["tuning"]), settings=settings)).run()


def emulator_share(compress: Any) -> float:
    """Return the share of the base's bytes that block Linears and experts take in an emulator that is to be made."""
    dtype = compress.base.skeleton.dtype
    planned = [part for part in compress.plan.planned if part.is_replaced]
    emulator_bytes = sum(part.nbytes(compress.format, dtype) for part in planned)
    return emulator_bytes / sum(part.numbers * dtype.itemsize for part in planned)


class Scores:
    """Losses of a model with different LoRAs on the same rows."""

    def __init__(self, model: Path, rows: Path, limit: int | None = None, dtype: str = "float32") -> None:
        from emloc_core.data.rows import load_rows
        from emloc_core.data.tokenize import encode
        from emloc_core.files.pretrained import load_model
        from emloc_core.model.opened import open_model

        opened, loaded = open_model(str(model)), load_rows(str(rows))[:limit]
        self.samples = encode(loaded, opened.processing(loaded))
        self.load = lambda: load_model(opened.family.auto_class, model, dtype=dtype).eval()

    def measure(self, adapter: Path | None) -> dict[str, Any]:
        """Return the loss per token, the share of rows that greedy decoding would write right, and each row's loss."""
        from torch.nn import functional

        from emloc_core.files.pretrained import load_lora

        losses, tokens, exact = [], 0, 0
        model = self.load()
        for logits, targets in self._answers(load_lora(model, adapter) if adapter else model):
            losses.append(float(functional.cross_entropy(logits, targets, reduction="sum")))
            tokens += len(targets)
            exact += bool((logits.argmax(-1) == targets).all())
        return {
            "nll": round(sum(losses) / tokens, 5),
            "exact_match": round(exact / len(losses), 4),
            "losses": " ".join(f"{loss:.3f}" for loss in losses),  # in one line of the results
        }

    def divergence(self, other: "Scores") -> float:
        """Return the KL divergence of another model from this one on the same answers, in nats per token."""
        from torch.nn import functional

        total, tokens = 0.0, 0
        answers = zip(self._answers(self.load()), other._answers(other.load()), strict=True)
        for (own, targets), (others, _) in answers:
            logs = (others.log_softmax(-1), own.log_softmax(-1))
            total += float(functional.kl_div(*logs, reduction="sum", log_target=True))
            tokens += len(targets)
        return round(total / tokens, 6)

    def _answers(self, model: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the logits of every row's answer, (tokens, vocabulary), in fp32, and the tokens that it has."""
        import torch

        for sample in self.samples:
            inputs = sample.inputs("cpu")
            counted = torch.tensor(sample.completion_mask[1:], dtype=torch.bool)
            targets = inputs["input_ids"][0, 1:][counted]
            last = {"use_cache": False, "logits_to_keep": len(targets) + 1}  # answers end their rows
            with torch.no_grad():
                logits = model(**inputs, **last).logits[0, :-1].float()
            yield logits, targets
