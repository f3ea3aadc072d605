"""``emloc demo-full``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.files.meter import peak_memory
from emloc_demo.comparison import chosen_clamp, compare
from emloc_demo.preparation import output_option, prepare


@click.command("demo-full")
@output_option("build/demo-full")
def command(output: Path) -> None:
    """Compare all ways of the demo, on longer messages and with five fields, in nine stages.

    Ordinary LoRAs on the model itself are trained too, as the upper bound. Needs 2 GB of disk, no network and no GPU,
    and takes about forty minutes on two cores. Finished parts are kept, so an interrupted demo resumes
    where it stopped.
    """
    compare(prepare(output, "emloc_demo.full", short=False), explain)


def explain(results: dict[str, Any]) -> str:
    """Return one paragraph that says what the table shows."""
    systems, stages = results["systems"], results["stages"]
    base, tuned, full = systems["base"], systems["base+corrected"], systems["full_lora"]
    polished, alone, longer = (systems[name] for name in ("base+polished", "exact_alone", "full_lora_60"))
    rows = results["tasks"]["fields_json"]["rows"]
    share = results["compression"]["bytes"]["emulator"] / results["compression"]["bytes"]["base"]

    def gain(system: dict[str, Any], upper: dict[str, Any]) -> str:
        return f"{(base['nll'] - system['nll']) / (base['nll'] - upper['nll']):.0%}"

    def right(system: dict[str, Any]) -> str:
        return f"{round(rows * system['exact_match'])} of {rows} messages entirely right"

    def peak(stage: str) -> str:
        return f"{(peak_memory(stages[stage]) or 0) / 1e9:.2f} GB"

    return (
        f"\nWhat you see: SmolLM2-135M itself has a loss of {base['nll']:.2f} per token on the right answers, with "
        f"{right(base)}. A LoRA was tuned on an emulator of {share:.0%} of its bytes, never touching the model itself, "
        f"and then corrected: {tuned['nll']:.3f}, {right(tuned)}. That is {gain(tuned, full)} of what the same LoRA "
        f"gains in loss when it is tuned on the model itself ({full['nll']:.3f}, {right(full)}). "
        f"{chosen_clamp(results)} Then came 20 exact steps on the model, read block by block: "
        f"{polished['nll']:.3f}, {right(polished)}; {gain(polished, longer)} of the gain of 60 steps of ordinary "
        f"LoRA ({longer['nll']:.3f}, {right(longer)}). The exact steps alone give {alone['nll']:.3f}, {right(alone)}. "
        f"Tuning took {peak('adapter')} on the emulator, {peak('polished')} by exact steps and {peak('full_lora')} on "
        "the model: in a model this small, "
        "activations and logits outweigh the weights, and it is the weights that the emulator saves."
    )
