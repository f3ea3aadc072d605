"""``emloc plan``, and what plans within a budget: ``emloc compress --memory``, a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner, Result
from emloc_llama import LLAMA
from emloc_qwen import QWEN_VL
from support.models import save_tiny_model
from support.planned import workload
from support.rows import tokenized_row
from transformers import AutoConfig, AutoTokenizer

from emloc_core.algorithms import native
from emloc_core.cli import cli
from emloc_core.cli.plan import in_longer_tuning
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_json
from emloc_core.memory import speed
from emloc_core.memory.evidence import Recovery, measured
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.workload import make_workload
from emloc_core.settings import CompressSettings, TrainSettings
from emloc_core.standins import RECOMMENDED


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def plan(*arguments: str | Path) -> dict[str, Any]:
    result = run("plan", *arguments, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def tuning_need(
    model: Path,
    ratio: float,
    length: int | None = None,
    data: Path | None = None,
    kind: str = "low-rank",
    device: str = "cpu",
    **train: Any,
) -> str:
    """The bytes of tuning the emulator of a ratio, as ``--memory`` takes them."""
    config_file, rows = model / "config.json", None if data is None else str(data)
    workload = make_workload(config_file, TrainSettings(**train), device, length=length, data=rows)
    planned = MemoryModel(config_file, workload, CompressSettings(kind=kind))
    return str(planned.tuning(planned.plan(ratio)).total)


#: As much memory as is named, all of it for tuning.
ALL = ("--headroom", 0, "--memory")


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, EmlocError), result.exception
    return str(result.exception)


def test_the_largest_ratio_within_a_budget(shallow_model: Path) -> None:
    tuning = tuning_need(shallow_model, 0.4, 16, batch_size=1)
    planned = plan(shallow_model, "--length", 16, *ALL, tuning, "--kind", "low-rank", "--batch-size", 1)
    assert planned["fits"]
    assert 0.4 <= planned["ratio"] < 0.45
    assert planned["budget_bytes"] == int(tuning)
    assert {linear["rank"] for linear in planned["linears"]} >= {int(planned["ratio"] * 32 * 64 / 96)}


def test_the_time_of_a_step(shallow_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", lambda *_: speed.Speed(1e6, 1e3))
    options = ("--length", 16, "--memory", "4GiB", "--device", "cpu")
    ways = plan(shallow_model, *options)["ways"]
    assert [way["seconds"] for way in ways] == [max(way["flops"] / 1e6, way["read_bytes"] / 1e3) for way in ways]
    assert ways[-1]["seconds"] == ways[-1]["read_bytes"] / 1e3
    shown = run("plan", shallow_model, *options, "--details").stdout
    assert "of weights per step, a step takes at least" in shown
    assert "on this machine's CPU (--card 'RTX 4090'" in shown
    assert "operations" not in run("plan", shallow_model, *options, "--no-measure").stdout
    unmeasured = plan(shallow_model, *options, "--no-measure")["ways"]
    assert all(way["seconds"] is None for way in unmeasured)
    assert plan(shallow_model / "config.json", *options)["ways"][-1]["seconds"] is not None


def test_without_a_budget_it_is_inference(shallow_model: Path) -> None:
    options = ("plan", shallow_model, "--length", 16, "--batch-size", 1, "--json")
    content = json.loads(run(*options).stdout)
    assert content["budget_bytes"] == content["memory_bytes"] == content["stages"][0]["bytes"]
    assert content["headroom_bytes"] == 0
    assert content["budget"] == "inference on the base"
    assert content["advice"]  # a tiny model's tuning never fits: it is all logits
    assert not content["fits"]


def test_what_is_shown_and_what_is_made_are_one_decision(shallow_model: Path) -> None:
    """The table shows the best way, and every way has the same rows per step."""
    options = ("--length", 16, "--batch-size", 2, "--memory")
    *_, exact = plan(shallow_model, *options, "4GiB")["ways"]
    tight = plan(shallow_model, *options, exact["bytes"], "--headroom", 0)
    assert tight["best"] == "exact steps"
    assert [stage["stage"] for stage in tight["stages"]][-2:] == ["exact steps", "merge"]
    assert {way["micro_batch"] * way["accumulation"] for way in tight["ways"]} == {2}
    shown = run("plan", shallow_model, *options, exact["bytes"], "--headroom", 0)
    assert shown.exception is None, shown.exception
    assert "No emulator" not in shown.stdout
    assert "--exact --batch-size 1 --accumulation 2 --max-length 16" in shown.stdout
    for name in ("LoRA on the base", "emulator"):
        needed = next(way["bytes"] for way in tight["ways"] if way["name"].startswith(name))
        planned = plan(shallow_model, *options, needed, "--headroom", 0)
        (stage,) = (
            entry for entry in planned["stages"] if entry["stage"].startswith(f"LoRA on the {name.split()[-1]}")
        )
        assert stage["bytes"] <= needed
        assert planned["workload"]["batch_size"] * planned["workload"]["accumulation"] == 2


def test_headroom_is_named_and_stays_free(shallow_model: Path) -> None:
    options = ("plan", shallow_model, "--length", 16, "--batch-size", 2, "--memory")
    needed = plan(*options[1:], "4GiB")["ways"][0]["bytes"]
    shown = run(*options, needed)
    assert "of which" in shown.stdout
    assert "best: LoRA on the base" not in shown.stdout
    assert "best: LoRA on the base" in run(*options, needed, "--headroom", 0).stdout
    assert "memory size, but none is given" in refused(*options[:-1], "--headroom", "1GiB")


@pytest.mark.thorough
def test_images_of_any_size(tmp_path: Path) -> None:
    settings = dict(QWEN_VL.tiny_configs[-1])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="float32")
    config.save_pretrained(tmp_path)
    options = ("--length", 64, "--batch-size", 2, "--memory", "4GiB", "--ratio", 0.5)
    shown = run("plan", tmp_path, *options, "--image-size", "24x16", "--details").stdout
    assert "1 image(s) of 24x16 pixels and 24 tokens per row" in shown
    assert "parameters of model.visual.deepstack_merger_list.* stay dense: small" in shown
    planned = plan(tmp_path, *options, "--image-size", "24x16")
    assert planned["workload"]["image"] == {"height": 16, "width": 24, "tokens": 24}
    assert {kept["pattern"] for kept in planned["kept_dense"]} == QWEN_VL.keep_dense.keys()
    assert "is not an image size" in refused("plan", tmp_path, *options, "--image-size", "24")
    # 448 x 448 pixels are more tokens than a row has.
    assert "leave no room for text" in refused("plan", tmp_path, *options)


def test_where_an_ordinary_lora_fits_no_emulator_is_needed(shallow_model: Path) -> None:
    options = ("--length", 16, "--batch-size", 2, "--memory", "4GiB")
    planned = plan(shallow_model, *options)
    assert planned["best"] == "LoRA on the base"
    assert [way["name"] for way in planned["ways"] if way["fits"]][-1] == "exact steps"
    exact = planned["ways"][-1]
    assert exact["read_bytes"] == 2 * planned["weight_bytes"]["base"]
    assert exact["bytes"] < planned["ways"][0]["bytes"]
    assert [stage["stage"] for stage in planned["stages"]] == ["inference on the base", "LoRA on the base", "merge"]
    assert "no emulator is needed" in run("plan", shallow_model, *options).stdout
    named = plan(shallow_model, *options, "--kind", "low-rank")  # who names a kind gets it, as from compress
    assert named["best"].startswith("emulator")
    assert {way["name"] for way in named["ways"] if way["fits"]} >= {"LoRA on the base", "exact steps"}


def test_a_low_ratio_is_a_warning_and_fewer_rows_at_once_make_room(shallow_model: Path) -> None:
    budget = tuning_need(shallow_model, 0.1, 16, batch_size=2)
    options = ("--length", 16, "--batch-size", 2, *ALL, budget)
    planned = plan(shallow_model, *options, "--kind", "low-rank")
    emulator = next(way for way in planned["ways"] if way["kind"] == "low-rank")
    assert (emulator["micro_batch"], emulator["accumulation"]) == (1, 2)
    assert emulator["ratio"] == planned["ratio"] > 0.1
    least = tuning_need(shallow_model, 0.1, 16, batch_size=1, accumulation=2)
    low = plan(shallow_model, "--length", 16, "--batch-size", 2, *ALL, least, "--kind", "low-rank")
    assert "may help the base little" in low["warnings"][0]
    shown = run("plan", shallow_model, *options).stdout
    assert "best: LoRA on the base, 1 x 2 rows per step; no emulator is needed" in shown
    assert f"emloc train {shallow_model} --data train.jsonl --batch-size 1 --accumulation 2 --max-length 16" in shown


def test_a_card_that_is_not_here(shallow_model: Path) -> None:
    options = ("--length", 16, "--batch-size", 1)
    planned = plan(shallow_model, *options, "--card", "rtx4090")
    assert (planned["card"], planned["memory_bytes"]) == ("RTX 4090", 24 * 10**9)
    assert [way["seconds"] for way in planned["ways"] if not way["read_bytes"]] == [
        way["flops"] / 165.2e12 for way in planned["ways"] if not way["read_bytes"]
    ]
    assert plan(shallow_model, *options, "--card", "A100", "--memory", "4GiB")["memory_bytes"] == 4 << 30
    shown = run("plan", shallow_model, *options, "--card", "H100", "--details").stdout
    assert "times are computed from the published figures of H100" in shown
    assert "by the published figures of H100." in shown
    assert "Did you mean 'RTX 4090'?" in refused("plan", shallow_model, "--card", "RTX 5090")
    assert "Give one of them" in refused("plan", shallow_model, "--card", "H100", "--device", "cpu")


def test_a_micro_batch_is_as_large_as_fits(shallow_model: Path) -> None:
    for rows in (2, 1):
        config = shallow_model / "config.json"
        workload = make_workload(config, TrainSettings(batch_size=4), "cpu", length=16).at_once(rows)
        needed = MemoryModel(config, workload).tuning().total
        planned = plan(shallow_model, "--length", 16, "--batch-size", 4, "--device", "cpu", *ALL, needed)
        assert (planned["ways"][0]["micro_batch"], planned["ways"][0]["accumulation"]) == (rows, 4 // rows)


@pytest.mark.thorough
def test_kto_needs_two_rows_at_once(shallow_model: Path) -> None:
    message = refused("plan", shallow_model, "--length", 64, "--objective", "kto", "--device", "cpu", *ALL, "100MB")
    assert "on 2 x 64 tokens needs" in message


def test_the_recommended_kind_is_the_first_that_fits(shallow_model: Path) -> None:
    config = shallow_model / "config.json"
    workload = make_workload(config, TrainSettings(batch_size=1), length=16)
    model = MemoryModel(config, workload, CompressSettings(kind="nf4"))
    four_bits, coded = (memory.tuning(memory.plan()).total for memory in (model, model.with_kind("trellis")))
    budgets = {"nf4": four_bits, "trellis": four_bits - 1, "low-rank-nf4": coded - 1}
    options = ("--length", 16, "--batch-size", 1, "--kind", "auto", *ALL)
    for kind, budget in budgets.items():
        planned = plan(shallow_model, *options, budget)
        best = next(way for way in planned["ways"] if way["fits"])
        polished = kind != "nf4"  # which leaves exact steps nothing to do
        assert (planned["kind"], best["kind"]) == (kind, kind)
        assert planned["best"] == ("emulator, then polish" if polished else "emulator")
        assert best["ratio"] == (planned["ratio"] if kind == "low-rank-nf4" else None)
        assert best["bytes"] <= budget
        shown = run("plan", shallow_model, *options, budget).stdout
        size = f" --ratio {planned['ratio']:g}" if kind == "low-rank-nf4" else ""
        device = " --device cpu" if best["compress_bytes"] > budget else ""
        arguments = f"--kind {kind}{size} --max-length 16{device} -o emulator"
        lines = [line.strip() for line in shown.splitlines()]
        first = next(index for index, line in enumerate(lines) if line.startswith("best: emulator")) + 1
        assert (
            lines[first : first + 3 + polished]
            == [
                f"emloc compress {shallow_model} --data train.jsonl {arguments}",
                "emloc train emulator --data train.jsonl --batch-size 1 --max-length 16 -o adapter",
                "emloc correct adapter -o corrected",
                "emloc polish corrected --data train.jsonl --batch-size 1 --accumulation 1 --max-length 16 -o polished",
            ][: 3 + polished]
        )
        recovery = measured(kind, best["ratio"])
        assert best["recovery"] == (recovery and recovery._asdict())
        assert ("of what an ordinary LoRA gains" in shown) == (recovery is not None)


def test_a_kind_that_cannot_be_made_here_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = workload(1, 16)
    assert rows.recommended_kinds == RECOMMENDED
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert rows.recommended_kinds == tuple(kind for kind in RECOMMENDED if kind != "trellis")


def test_a_first_stage_that_needs_more_than_tuning_is_a_warning(
    shallow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = tuning_need(shallow_model, 0.5, 16, kind="nf4", device="cuda", batch_size=1)
    options = ("--length", 16, "--batch-size", 1, "--device", "cuda", *ALL, budget)
    for beyond, warned in ((0, False), (1, True)):
        monkeypatch.setattr(
            "emloc_core.memory.streamed.compress", lambda *_, n=beyond: Need("compress", {"weights": int(budget) + n})
        )
        shown = run("plan", shallow_model, *options).stdout
        assert ("run it with --device cpu" in shown) == warned
        assert ("--max-length 16 --device cpu -o emulator" in shown) == warned


def test_the_commands_have_the_workload_that_was_planned(shallow_model: Path) -> None:
    options = ("--length", 48, "--batch-size", 2, "--lora-rank", 4, "--no-gradient-checkpointing", "--memory")
    shown = run("plan", shallow_model, *options, "4GiB").stdout
    flags = "--batch-size 2 --no-gradient-checkpointing --lora-rank 4 --max-length 48"
    assert f"emloc train {shallow_model} --data train.jsonl {flags} -o adapter\n" in shown


@pytest.mark.thorough
def test_preferences_are_planned_by_rows_of_two_answers(shallow_model: Path) -> None:
    options = ("--length", 32, "--batch-size", 4, "--kind", "nf4", "--memory")
    answers = plan(shallow_model, *options, "4GiB")
    pairs = plan(shallow_model, *options, "4GiB", "--objective", "dpo")
    assert pairs["workload"]["batch_size"] == answers["workload"]["batch_size"] == 4
    assert {way["name"] for way in pairs["ways"]} == {"LoRA on the base", "emulator"}
    assert (answers["workload"]["learning_rate"], pairs["workload"]["learning_rate"]) == (1e-2, 5e-6)
    doubled = plan(shallow_model, "--length", 32, "--batch-size", 8, "--kind", "nf4", "--memory", "4GiB")
    paired, two, one = (next(way for way in report["ways"] if not way["kind"]) for report in (pairs, doubled, answers))
    assert paired["bytes"] == two["bytes"] > one["bytes"]
    tight = next(way["bytes"] for way in pairs["ways"] if way["kind"]) - 1
    shown = run("plan", shallow_model, *options, tight, "--headroom", 0, "--objective", "dpo").stdout
    assert "--data train.jsonl --batch-size 2 --accumulation 2 --objective dpo --max-length 32" in shown


def test_one_row_at_a_time_counts_the_gradients_that_are_accumulated(shallow_model: Path) -> None:
    load = workload(batch=4, length=16)
    together, alone = (MemoryModel(shallow_model / "config.json", load) for load in (load, load.at_once(1)))
    assert (alone.workload.batch_size, alone.workload.rows_per_step) == (1, together.workload.rows_per_step)
    assert alone.tuning() == MemoryModel(shallow_model / "config.json", workload(1, 16, accumulation=4)).tuning()


def test_a_ratio_that_compress_would_refuse_is_not_planned(shallow_model: Path) -> None:
    options = ("--ratio", 0.8, "--kind", "nf4", "--memory", "1GiB")
    assert "has no ratio" in refused("plan", shallow_model, "--length", 16, *options)


def test_compress_takes_the_recommended_kind(shallow_model: Path, rows_file: Path, tmp_path: Path) -> None:
    options = ("compress", shallow_model, "--data", rows_file, "-o", tmp_path / "emulator", "--dry-run", "--json")
    assert json.loads(run(*options, "--kind", "auto").stdout)["kind"] == "nf4"
    least = tuning_need(shallow_model, 0.5, data=rows_file, kind="nf4", batch_size=1)
    single = ("--batch-size", 1)

    def chosen(memory: str, *more: str | Path) -> str:
        return json.loads(run(*options, *single, *ALL, memory, *more).stdout)["kind"]

    for kind in ([], ["--kind", "auto"]):
        assert chosen("4GiB", *kind) == chosen(least, *kind) == "nf4"
    note = run(*options, "--memory", "4GiB").stderr
    assert "note: an ordinary LoRA on the model itself fits too" in note
    assert f"`emloc train {shallow_model} --batch-size 8 --accumulation 1`, with these rows" in note
    assert "note" not in run(*options, *single, *ALL, least).stderr
    assert chosen(least, "--kind", "trellis") == "trellis"
    assert plan(shallow_model, "--data", rows_file, *single, *ALL, least)["kind"] == "nf4"
    assert plan(shallow_model, "--data", rows_file, *single, "--ratio", 0.5)["kind"] == "low-rank"
    assert "Write the unit: 24GiB" in refused(*options, "--memory", "24")


def test_an_emulator_is_tuned_on_the_rows_that_it_was_planned_for(rows_file: Path, tmp_path: Path) -> None:
    wide = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 1024}
    model = save_tiny_model(LLAMA.tiny_configs[0] | wide, tmp_path / "wide")
    four_bits = tuning_need(model, 0.5, data=rows_file, kind="nf4", batch_size=1, accumulation=2)
    emulator = tmp_path / "emulator"
    common = ("compress", model, "--data", rows_file, "--samples", 4, "--selection", 2, "--batch-size", 2)
    compressed = run(*common, *ALL, four_bits, "-o", emulator)
    assert compressed.exception is None, compressed.exception
    assert "nf4), 1 x 2 rows per step" in compressed.stderr
    assert "emloc train" in compressed.stdout
    assert "--batch-size 1 --accumulation 2" in compressed.stdout

    def trained(name: str, *more: object) -> tuple[int, int]:
        options = ("--data", rows_file, "--steps", 1, "--no-bf16", "-o", tmp_path / name)
        result = run("train", emulator, *options, *more)
        assert result.exception is None, result.exception
        settings = read_json(tmp_path / name / "emloc.json")["request"]["settings"]
        return settings["batch_size"], settings["accumulation"]

    assert trained("as-planned") == (1, 2)
    assert trained("as-said", "--batch-size", 3) == (3, 1)
    again = run(*common, "--memory", "4GiB", "-o", emulator)  # the same emulator, for more memory
    assert again.exception is None, again.exception
    assert read_json(emulator / "emloc.json")["result"]["tuning"] == {"batch_size": 2, "accumulation": 1}


def test_a_table_for_a_person(shallow_model: Path) -> None:
    options = ("--length", 64, "--batch-size", 2, "--lora-rank", 4, "--kind", "low-rank", "--memory", "4GiB")
    shown = run("plan", shallow_model, *options, "--details").stdout
    expected = ["2 per step x 64 tokens", "LoRA of rank 4 on down_proj", "with gradient checkpointing",
                "LoRA on the base", "compress", "merge", "KV cache", "optimiser", "ratio 0.99", "1 x down_proj",
                "4.29 GB, of which 215 MB stay free"]  # fmt: skip
    for text in expected:
        assert text in shown
    assert "offloading" not in shown


def test_the_length_comes_from_the_rows(shallow_model: Path, rows_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    longest = max(len(tokenized_row(row, tokenizer).input_ids) for row in load_rows(str(rows_file)))
    options = ("--data", rows_file, "--batch-size", 1, "--kind", "low-rank", "--ratio", 0.5)
    assert plan(shallow_model, *options)["workload"]["length"] == longest
    assert plan(shallow_model, *options, "--length", 9)["workload"]["length"] == 9


def test_a_config_is_enough(shallow_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.json"
    file.write_bytes((shallow_model / "config.json").read_bytes())
    options = ("--ratio", 0.5, "--batch-size", 1)
    alone = plan(file, *options)
    assert alone["stages"] == plan(shallow_model, *options)["stages"]
    assert alone["workload"]["length"] == 256  # the model takes no more


def test_the_commands_import_a_model_of_another_layout_first(shallow_model: Path, tmp_path: Path) -> None:
    config = {name: value for name, value in read_json(shallow_model / "config.json").items() if value is not None}
    entry = {"id": "org/own", "family": "llama", "layout": "theirs", "presets": {"default": {}}}
    (tmp_path / "own.toml").write_text(tomli_w.dumps({**entry, "config": config}))
    assert plan(tmp_path / "own.toml", "--memory", "4GiB")["layout"] == "theirs"
    for kind, following in (("auto", "train"), ("low-rank", "compress")):
        shown = run("plan", tmp_path / "own.toml", "--memory", "4GiB", "--kind", kind, "--no-measure").stdout
        first, second, *others = (line for line in shown.splitlines() if line.startswith("  emloc "))
        assert first == "  emloc import org/own -o base"
        assert second.startswith(f"  emloc {following} base ")
        assert not any("org/own" in line for line in others)


def test_what_is_refused(shallow_model: Path, rows_file: Path, tmp_path: Path) -> None:
    assert "'plenty'" in refused("plan", shallow_model, "--memory", "plenty")
    assert "There is no model at" in refused("plan", tmp_path / "nothing")
    assert "has no config.json" in refused("plan", tmp_path)
    assert "takes at most 256 tokens, not 257" in refused("plan", shallow_model, "--length", "257")
    (tmp_path / "config.json").write_bytes((shallow_model / "config.json").read_bytes())
    assert "has no tokenizer" in refused("plan", tmp_path, "--data", rows_file)
    message = refused("plan", shallow_model, "--memory", "100kB", "--batch-size", 1, "--length", 16)
    assert "No way to tune fits 100 kB" in message
    assert "no length fits" in message


def test_compress_takes_a_budget(shallow_model: Path, rows_file: Path, tmp_path: Path) -> None:
    budget = tuning_need(shallow_model, 0.35, data=rows_file, batch_size=2)
    kind = ["--kind", "low-rank"]
    expected = plan(shallow_model, "--data", rows_file, "--batch-size", 2, *ALL, budget, *kind)["ratio"]
    output = tmp_path / "emulator"
    common = ["compress", shallow_model, "--data", rows_file, "--samples", 4, "--selection", 2, "-o", output, *kind]
    result = run(*common, *ALL, budget, "--batch-size", 2)
    assert result.exception is None, result.exception
    assert f"(low-rank at ratio {expected:g})" in result.stderr
    manifest = read_json(output / "emloc.json")
    assert manifest["request"]["settings"]["ratio"] == expected
    again = run(*common, "--ratio", expected)  # the same request: finished already
    assert again.exception is None, again.exception
    assert read_json(output / "emloc.json") == manifest
    assert "ratio" in refused(*common, "--ratio", 0.5)  # another request


@pytest.mark.parametrize(("device", "warns"), [("auto", True), ("cpu", False)])
def test_compress_warns_where_making_takes_more_than_tuning(
    shallow_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, warns: bool
) -> None:
    monkeypatch.setattr("emloc_core.memory.streamed.compress", lambda *_: Need("compress", {"weights": 10**12}, "all"))
    budget = tuning_need(shallow_model, 0.35, data=rows_file, batch_size=2)
    argv = ["compress", shallow_model, "--data", rows_file, *ALL, budget, "--batch-size", 2, "--kind", "low-rank"]
    result = run(*argv, "--device", device, "--dry-run", "-o", tmp_path / "emulator")
    assert ("warning: making the emulator (compress) needs 1,000 GB, more than the memory" in result.stderr) == warns


@pytest.mark.usefixtures("calls_here")
def test_a_recipe_takes_a_budget(shallow_model: Path, rows_file: Path, tmp_path: Path) -> None:
    train = {"batch_size": 2, "lora_rank": 5, "bf16": False}
    budget = tuning_need(shallow_model, 0.35, 12, rows_file, **train)
    tuning = ["--data", rows_file, "--batch-size", 2, "--lora-rank", 5, "--no-bf16", "--length", 12]
    planned = plan(shallow_model, *tuning, *ALL, budget, "--kind", "low-rank")
    expected = planned["ratio"]
    assert expected < 0.4 or planned["workload"]["batch_size"] < 2  # the budget decides it
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"[model]\nbase = '{shallow_model}'\nmemory = '{budget}'\nheadroom = '0'\n[data]\ntrain = '{rows_file}'\n"
        "[compress]\nkind = 'low-rank'\n[train]\nbatch_size = 2\nlora_rank = 5\nbf16 = false\nmax_length = 12\n"
    )
    result = run("run", recipe, "--dry-run", "--json")
    assert result.exception is None, result.exception
    assert f"emulator, then polish (low-rank at ratio {expected:g})" in result.stderr
    emulator, adapter = (stage["request"]["settings"] for stage in json.loads(result.stdout)["stages"][:2])
    assert emulator["ratio"] == expected
    assert adapter["batch_size"] == planned["workload"]["batch_size"]
    assert adapter["batch_size"] * adapter["accumulation"] == 2
    assert "No emulator's tuning fits 100 kB" in refused("run", recipe, "--dry-run", "--set", "model.memory=100kB")


def test_compress_refuses(shallow_model: Path, rows_file: Path, tmp_path: Path) -> None:
    common = ["compress", shallow_model, "--data", rows_file, "-o", tmp_path / "emulator"]
    assert "ratio and memory" in refused(*common, "--memory", "1GB", "--ratio", 0.5)
    assert "'much'" in refused(*common, "--memory", "much")
    assert "batch_size has no effect without memory" in refused(*common, "--batch-size", 2)
    assert "No emulator's tuning fits" in refused(*common, "--memory", "100kB", "--batch-size", 1)
    assert not (tmp_path / "emulator").exists()


@pytest.mark.parametrize(
    ("changed", "polished", "sentence"),
    [
        (None, None, ""),
        (0.004, None, "; in 960 steps it was as much"),
        (-0.026, 0.975, "; in 960 steps it was 0.03 less, and 0.97 with exact ones"),
    ],
)
def test_a_plan_says_what_longer_tuning_gives(changed, polished, sentence):
    assert in_longer_tuning(Recovery(0.93, 0.985, changed, polished)) == sentence
