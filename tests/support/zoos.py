"""Zoos for the tests of the report: stores of every state, filled through the store itself, with no model behind."""

import math
from pathlib import Path
from typing import Any

from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import LOGS, Demand
from emloc_core.zoo.state.store import Store

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip
HOSTILE = '<script>document.title="broken in"</script><img src=x onerror=alert(1)>"\'&{{ 7*7 }}'
LOG = (
    b"\x1b[31mloading\x1b[0m shards\r 10%\r100%\n\x1b]0;title\x07\x00\x01\xff\xfebytes\n"
    + HOSTILE.encode()
    + b"\n</pre></details>\xe2\x80\xaedesrever\nemloc: error: model-00002.safetensors ends too early.\n"
)


def linears(blocks: int, tower: str = "model.layers", seed: int = 1) -> list[dict[str, Any]]:
    """Linears of a tower as in a result, with errors that differ by block and kind; the last block's o_proj dense."""
    entries = []
    for block in range(blocks):
        for number, kind in enumerate(KINDS):
            error = 0.02 * (number + 1) + 0.1 * math.sin((block + seed) / 4 + number) ** 2 + 0.1 * block / blocks
            dense = block == blocks - 1 and kind.endswith("o_proj")
            entries.append({"path": f"{tower}.{block}.{kind}", "relative_error": None if dense else error})
    return entries


def result(seed: int = 1, blocks: int = 24, complete: bool = True) -> dict[str, Any]:
    """The result of a job: its emulator alone, or everything that there can be."""
    base = 10**8 * (seed % 17 + 1)
    content: dict[str, Any] = {
        "kind": "low-rank",
        "ratio": 0.6,
        "family": "alpaca",
        "bytes": {"base": base, "emulator": int(base * 0.68)},
        "linears": linears(blocks, seed=seed),
        "stages": {"emulator": {"seconds": 31.5 + seed, "peak_rss_bytes": 900_000_000}},
    }
    if complete:
        content["linears"] = linears(12, "model.vision_tower.layers", seed) + content["linears"]
        content["stages"] |= {
            "adapter": {"seconds": 260.0, "peak_rss_bytes": 2_360_000_000},
            "corrected": {"seconds": 4.2, "peak_rss_bytes": 700_000_000},
            "evaluation": {"seconds": 99.0, "peak_rss_bytes": 600_000_000},
        }
        content |= {"loss": 0.41, "correction": {"nll": 0.38}}
        content["systems"] = {
            name: {"nll": nll, "acc": 1 - nll / 2, "seconds": 20.0, "peak_bytes": 1_940_000_000}
            for name, nll in (
                ("base", 1.1597),
                ("emulator", 1.9),
                ("base+uncorrected", 0.182),
                ("base+corrected", 0.18),
            )
        }
        content["metrics"] = {"nll": {"higher_is_better": False}, "acc": {"higher_is_better": True}}
    return content


def add(store: Store, name: str, fingerprint: str | None = None, **settings: Any) -> ZooJob:
    """Add a job that waits."""
    arguments = {"model": f"/models/{name}", "data": "/data/rows.jsonl", **settings}
    job = ZooJob(name=name, **arguments)
    store.add([job], [fingerprint or f"{name}-fingerprint"])
    return job


def run(store: Store, job: ZooJob, outcome: Outcome, number: int = 1, log: bytes = b"", **end: Any) -> None:
    """Let an attempt at a job begin and end."""
    path = store.directory / LOGS / f"{job.name}.{number}.log"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(log)
    store.start(job.name, number, f"{LOGS}/{path.name}")
    store.finish(job.name, number, 100.0 * number, outcome, **end)


def all_states(directory: Path) -> Path:
    """A zoo with jobs of all states but running, for which a driver is needed; hostile strings and NaN among them."""
    store = Store(directory, create=True)
    run(
        store,
        add(store, "tiny-alpaca-1B", train={}, eval={"tasks": ["own"]}),
        Outcome(None, result=result(3), host="node-1"),
    )
    idle = [{**linear, "relative_error": None} for linear in linears(6, "model.visual.blocks")]
    of_text = {**result(5, complete=False), "linears": [*idle, *linears(24)]}
    run(store, add(store, "only-the-emulator"), Outcome(None, result=of_text))
    unclear = result(2, blocks=16, complete=False)
    unclear["linears"][20]["relative_error"] = math.nan
    run(store, add(store, "not-a-number"), Outcome(None, result=unclear))
    slow = add(store, "second-try")
    run(store, slow, Outcome("out of memory", "The worker was killed while it made the emulator; calibration samples "
        "64 -> 32."), again=True, smaller=slow.smaller("emulator"))  # fmt: skip
    run(store, slow, Outcome(None, result=result(7, complete=False)), 2)
    broken = add(store, "a-very-long-name-of-a-model-that-does-not-fit-anywhere-70B-Instruct-v0.3-preview-2026",
                 model=f"/models/{HOSTILE}")  # fmt: skip
    run(store, broken, Outcome("bad input", f"{HOSTILE} model-00002.safetensors ends too early."), log=LOG)
    retried = add(store, "to-be-tried-again")
    run(store, retried, Outcome("input/output", "\x1b[31mThe disk did not answer."), again=True, log=b"slow\n")
    add(store, "the-same-again", "tiny-alpaca-1B-fingerprint")
    add(store, "waits")
    store.plan({"waits": Demand(memory=8_000_000_000, disk=20_000_000_000, base=16_000_000_000, emulator=9_600_000_000,
                               inference=17_000_000_000, tuning=15_000_000_000)})  # fmt: skip
    add(store, "cut-off")
    (directory / LOGS / "cut-off.1.log").write_bytes(b"block 3 of 24\n")
    store.start("cut-off", 1, f"{LOGS}/cut-off.1.log")
    store.close()
    return directory


def many(directory: Path, count: int = 200) -> Path:
    """A zoo of many finished jobs."""
    store = Store(directory, create=True)
    for number in range(count):
        job = add(store, f"model-{number}")
        run(store, job, Outcome(None, result=result(number, blocks=32)))
    store.close()
    return directory
