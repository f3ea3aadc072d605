"""Peak memory of each stage on SmolLM2-135M in fp32, beside that of loading the model whole.

Every measurement is a process of its own. `make bench` prints the table and writes it to benchmarks/results/.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from emloc_core.output import versions

RESULTS = Path(__file__).parent / "results"

#: Run in a process of its own: prints the peak after the imports, and the peak after the work.
MEASURE = """
    import json, sys
    from pathlib import Path
    import torch, transformers
    import emloc_core.emulator, emloc_core.transfer, emloc_core.merge
    from emloc_core.adapter import Adapter
    from emloc_core.checkpoint import Checkpoint
    from emloc_core.data import load_rows
    from emloc_core.meter import Meter, peak_rss_bytes
    from emloc_core.settings import CompressSettings, CorrectSettings

    transformers.AutoModelForCausalLM  # the lazy import is part of the floor
    from transformers.models.llama import modeling_llama
    work, what, floor = Path(sys.argv[1]), sys.argv[2], peak_rss_bytes()
    meter = Meter()
    base = Checkpoint(work / "base")
    if what == "load whole":
        model = transformers.AutoModelForCausalLM.from_pretrained(work / "base", dtype="auto")
        sum(float(parameter.sum()) for parameter in model.parameters())  # touch every page
    elif what == "compress":
        rows = load_rows(str(work / "data" / "train.jsonl"))
        emloc_core.emulator.Compression(base, rows, work / "emulator", CompressSettings()).run()
    elif what == "adapter":
        from peft import LoraConfig, get_peft_model
        import emloc_core.lowrank
        model = transformers.AutoModelForCausalLM.from_pretrained(work / "emulator", dtype="auto")
        peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        peft_model.save_pretrained(work / "adapter")
    elif what.startswith("correct"):
        clamp = "auto" if what.endswith("auto") else 3
        output = work / what.replace(" ", "-")
        settings = CorrectSettings(clamp=clamp)
        emloc_core.transfer.Transfer(Adapter(work / "adapter"), base, output, settings).run()
    else:
        emloc_core.merge.Merge(Adapter(work / "correct-3"), base, work / "merged").run()
    print(json.dumps({"floor_bytes": floor, **meter.read()}))
"""


def measure(work: Path, what: str) -> dict:
    script = textwrap.dedent(MEASURE)
    done = subprocess.run([sys.executable, "-c", script, str(work), what], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    reading = json.loads(done.stdout.splitlines()[-1])
    above = reading["peak_rss_bytes"] - reading["floor_bytes"]
    return {"what": what, **reading, "above_imports_bytes": above}


def machine() -> dict:
    return {"cpus": os.cpu_count(), "system": platform.system(), "machine": platform.machine(), "gpu": None}


def main() -> None:
    from emloc_demo.data import write_data
    from emloc_demo.model import write_base

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_base(work / "base")
        write_data(work / "data")
        rows = [measure(work, what) for what in ("load whole", "compress")]
        measure(work, "adapter")
        rows += [measure(work, what) for what in ("correct 3", "correct auto", "merge")]
    whole = rows[0]["above_imports_bytes"]
    for row in rows:
        row["share_of_whole"] = round(row["above_imports_bytes"] / whole, 3)
    goals = [
        {"name": f"{row['what']}: peak above imports below that of loading the model whole", "goal": 1.0,
         "value": row["share_of_whole"], "met": row["share_of_whole"] < 1}
        for row in rows[1:]
    ]  # fmt: skip
    result = {"command": "make bench", "machine": machine(), "versions": versions(), "rows": rows, "goals": goals}
    header = "| SmolLM2-135M, fp32 | peak RSS, MB | above imports, MB | of loading whole | seconds |"
    table = [header, "| --- | --- | --- | --- | --- |"]
    table += [
        f"| {row['what']} | {row['peak_rss_bytes'] / 1e6:.0f} | {row['above_imports_bytes'] / 1e6:.0f} "
        f"| {row['share_of_whole']:.2f} | {row['seconds']:.1f} |"
        for row in rows
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "memory.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
