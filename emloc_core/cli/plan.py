"""``emloc plan``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.options import options, validated
from emloc_core.memory.budget import Fit, advice, largest_ratio, no_fit
from emloc_core.settings import MEMORY_SETTINGS, TrainSettings
from emloc_core.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from emloc_core.emulator.ranks import Plan
    from emloc_core.memory.model import MemoryModel, Need


@click.command("plan")
@click.argument("model")
@click.option("--memory", metavar="SIZE", help="What tuning may use, such as 24GiB or 24GB; by default, what inference "
              "on the base needs with the same batch and length.")  # fmt: skip
@click.option("--ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Plan this emulator, instead of the largest that fits.")  # fmt: skip
@click.option("--data", help="Rows, as of emloc train: the longest says how many tokens a row has.")
@click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
@click.option("--length", "--max-length", "--sequence-length", type=click.IntRange(1),
              help="Tokens a row, those of images included; with --data, where rows are cut.  "
              "[default: 1024]")  # fmt: skip
@click.option("--images", type=click.IntRange(0), help="Images a row; where the vision tower takes one size, a photo "
              "that is cut into tiles is as many.  [default: those of the rows, or 1 for an image-text model]"
              )  # fmt: skip
@click.option("--image-size", metavar="WIDTHxHEIGHT", help="Of every image in pixels, for a model that takes any.  "
              "[default: that of the rows, or 448x448]")  # fmt: skip
@options(TrainSettings, skip=set(TrainSettings.model_fields) - set(MEMORY_SETTINGS))
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
              help="Whose memory: a GPU's, or this process's.")  # fmt: skip
@click.option("--figure", type=click.Path(path_type=Path), metavar="FILE", help="Draw the table: png, svg or pdf.")
@as_json
def command(
    model: str,
    memory: str | None,
    ratio: float | None,
    data: str | None,
    split: str,
    length: int | None,
    images: int | None,
    device: str,
    figure: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Say what every stage needs for MODEL, from its config alone, and how large an emulator fits.

    MODEL is a directory, a config.json, an entry of the registry (its id, or its file), or a hub id, of which nothing
    but the config is fetched, and with --data the tokenizer. Nothing is loaded and nothing is trained.
    """
    budget = parse_bytes(memory) if memory is not None else None
    image_size = settings.pop("image_size")
    train = validated(TrainSettings, settings)

    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.model.image_shape import parse_size
    from emloc_core.registry.registry import config_of

    size = parse_size(image_size) if image_size is not None else None
    with config_of(model, with_tokenizer=data is not None) as config_file:
        workload = make_workload(
            config_file, train, device, length=length, images=images, image_size=size, data=data, split=split
        )
        planned = _plan(model, MemoryModel(config_file, workload), budget, ratio)
    if figure:
        from emloc_core.memory.show import memory_figure

        memory_figure(figure, planned.needs, planned.budget)
    if as_json:
        print_json(planned.describe())
    else:
        planned.print()
    if planned.advice:
        raise no_fit(planned.budget, planned.advice)


@dataclass(frozen=True)
class _Planned:
    name: str
    model: "MemoryModel"
    needs: "Sequence[Need]"
    plan: "Plan"
    ratio: float
    budget: int
    given: bool
    advice: list[str]

    def describe(self) -> dict[str, Any]:
        model, workload = self.model, self.model.workload
        tuning = next(need for need in self.needs if need.stage == "LoRA on the emulator")
        return {
            "model": self.name,
            "family": model.family.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "workload": {
                "batch_size": workload.batch_size,
                "length": workload.length,
                "images": workload.images,
                "image": model.image.describe() if model.image else None,
                "gradient_checkpointing": workload.train.gradient_checkpointing,
                "bf16": workload.train.bf16,
                "lora_rank": workload.train.lora_rank,
                "target_modules": model.targets,
                "device": workload.device,
            },
            "budget_bytes": self.budget,
            "budget": "given" if self.given else "inference on the base",
            "ratio": self.ratio,
            "fits": tuning.total <= self.budget,
            "advice": self.advice,
            "parameters": {"base": model.parameters(), "emulator": model.parameters(self.plan)},
            "weight_bytes": {
                "base": model.parameters() * model.dtype.itemsize,
                "emulator": model.parameters(self.plan) * model.dtype.itemsize,
            },
            "stages": [
                {"stage": need.stage, "bytes": need.total, "at": need.phase, "terms": dict(need.terms)}
                for need in self.needs
            ],
            "linears": [linear.describe() for linear in self.plan.linears],
            "kept_dense": [vars(kept) for kept in self.plan.kept],
        }

    def print(self) -> None:
        from emloc_core.memory.show import print_memory

        said = self.describe()
        work, weights, parameters = said["workload"], said["weight_bytes"], said["parameters"]
        click.echo(f"{said['model']}: family {said['family']}, {parameters['base'] / 1e9:.3g} billion parameters in "
                   f"{said['dtype']}, {human_bytes(weights['base'])}")  # fmt: skip
        images = ""
        if image := work["image"]:
            size = f"{image['width']}x{image['height']} pixels and {image['tokens']} tokens"
            images = f", {work['images']} image(s) of {size} a row among them"
        checkpointing = "with" if work["gradient_checkpointing"] else "without"
        click.echo(f"workload: {work['batch_size']} rows x {work['length']} tokens{images}; {checkpointing} gradient "
                   f"checkpointing; {'bf16 autocast' if work['bf16'] else 'no autocast'}; LoRA of rank "
                   f"{work['lora_rank']} on {', '.join(work['target_modules'])}; on {work['device']}")  # fmt: skip
        print_memory(self.needs)
        click.echo(f"emulator at ratio {self.ratio:g}: {parameters['emulator'] / 1e9:.3g} billion parameters, "
                   f"{human_bytes(weights['emulator'])}; {len(self.plan.ranks)} Linears at these ranks:")  # fmt: skip
        for line in self.plan.lines():
            click.echo(f"  {line}")
        self._judge(said["fits"])

    def _judge(self, fits: bool) -> None:
        inference, tuning = (
            next(need.total for need in self.needs if need.stage == stage)
            for stage in ("inference on the base", "LoRA on the emulator")
        )
        whose = "the budget of" if self.given else "what inference on the base needs,"
        if fits:
            click.echo(f"tuning the emulator needs {human_bytes(tuning)} and fits {whose} {human_bytes(self.budget)}")
        elif not self.advice:
            click.echo(f"tuning the emulator needs {human_bytes(tuning)} and does NOT fit {whose} "
                       f"{human_bytes(self.budget)}")  # fmt: skip
        if self.given and inference > self.budget:
            click.echo(f"inference on the base needs {human_bytes(inference)}: within this budget the tuned base runs "
                       "only with offloading (device_map='auto') or quantised")  # fmt: skip


def _plan(name: str, model: "MemoryModel", budget: int | None, ratio: float | None) -> _Planned:
    from emloc_core.memory import stages as streamed

    inference = model.inference()
    allowed = inference.total if budget is None else budget
    fit: Fit | None = None
    if ratio is None:
        fit = largest_ratio(model, allowed)
    chosen = fit.ratio if fit else ratio or 0.01
    plan = model.plan(chosen)
    tuning = fit.need if fit else model.tuning(plan)
    needs = [
        inference,
        model.tuning(),
        streamed.compress(model, plan),
        tuning,
        streamed.correct(model, plan),
        streamed.merge(model),
    ]
    advised = list(advice(model, allowed)) if ratio is None and fit is None else []
    return _Planned(name, model, needs, plan, chosen, allowed, budget is not None, advised)
