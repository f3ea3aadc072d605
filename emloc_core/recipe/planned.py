"""The planned memory of a run's stages, to be shown beside what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST, input_name
from emloc_core.files.output import TIMING

if TYPE_CHECKING:
    from emloc_core.memory.model import MemoryModel


def planned_bytes(outputs: Mapping[str, Path], ending: str) -> dict[str, int]:
    """Return the planned bytes of the stages of a LoRA, by stage; empty without the base's config."""
    from emloc_core.memory import streamed

    emulator, adapter, corrected, polished = (
        f"{name}{ending}" for name in ("emulator", "adapter", "corrected", "polished")
    )
    try:
        tuned = read_json(outputs[adapter] / MANIFEST)
        model = _model(outputs.get(emulator), outputs[adapter], tuned)
        peaks = {f"merged{ending}": streamed.merge(model).total, "full_lora": model.tuning().total}
        if polished in outputs:
            steps = read_json(outputs[polished] / MANIFEST)["request"]["settings"]
            rows = steps["batch_size"]
            peaks[polished] = streamed.exact(model, rows * steps["accumulation"], rows).total
        if emulator not in outputs:
            exact = tuned["request"].get("exact", False)
            rows = model.workload.batch_size
            need = streamed.exact(model, at_once=rows) if exact else model.tuning()
            return {**peaks, adapter: need.total}
        plan = model.linears.as_described(read_json(outputs[emulator] / MANIFEST)["result"]["linears"])
        request = read_json(outputs[corrected] / MANIFEST)["request"] if corrected in outputs else {}
        return {
            **peaks,
            emulator: streamed.compress(model, plan).total,
            adapter: model.tuning(plan, exists=True).total,
            corrected: streamed.correct(model, plan, request.get("clamp")).total,
        }
    except (EmlocError, KeyError, StopIteration, TypeError, ValueError, OSError):  # the page is useful without a plan
        return {}


def _model(emulator: Path | None, adapter: Path, tuned: Mapping[str, Any]) -> "MemoryModel":
    """Return the memory of the base on the rows of tuning: the longest, or the ones that were kept if they have images.

    Raises:
        KeyError, StopIteration, OSError: something is missing.
    """
    from emloc_core.data.rows import CALIBRATION, SELECTION
    from emloc_core.memory.model import MemoryModel
    from emloc_core.memory.workload import make_workload
    from emloc_core.settings import CompressSettings, TrainSettings

    config = Path(input_name(emulator, "base") if emulator else input_name(adapter, "model")) / "config.json"
    settings = TrainSettings(**tuned["request"]["settings"])
    device = "cuda" if "peak_gpu_bytes" in read_json(adapter / TIMING) else "cpu"  # any accelerator plans alike
    if emulator is None:
        workload = make_workload(config, settings, device, length=tuned["result"]["longest_tokens"])
        if workload.images:
            raise KeyError("images")  # nothing says how many a row has
        return MemoryModel(config, workload)
    files = (emulator / name for name in (CALIBRATION, SELECTION))
    rows = next(str(path) for path in files if path.stat().st_size)  # without calibration there are no such rows
    workload = make_workload(config, settings, device, length=settings.max_length, data=rows)
    compress_settings = read_json(emulator / MANIFEST)["request"]["settings"]
    return MemoryModel(config, workload, CompressSettings(**compress_settings))
