"""Evaluation of systems: a process each, what is compared, kept and refused."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import make_adapter
from support.evaluation import completions, direct_nll, evaluate, metrics_of, system
from support.marks import thorough
from support.models import save_in_four_bits
from support.run import patch_calls
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_core.cli.eval import command
from emloc_core.cli.stage import perform
from emloc_core.errors import EmlocError
from emloc_core.evaluation import evaluate as evaluation
from emloc_core.evaluation import loading
from emloc_core.evaluation.evaluate import Evaluate, canonical_systems
from emloc_core.evaluation.loading import load_system
from emloc_core.evaluation.new_task import write_task
from emloc_core.evaluation.tasks import find_task
from emloc_core.files import pretrained
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import MANIFEST
from emloc_core.processes.call import ProcessDiedError
from emloc_core.requests import make_request
from emloc_core.standins.format import MARK


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A LoRA that changes the model: both halves random."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    directory = tmp_path_factory.mktemp("adapters") / "random"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tasks(rows_file, tmp_path_factory):
    """A task of a loss and a task of generation on the shared rows."""
    directory = tmp_path_factory.mktemp("tasks")
    return [str(write_task(kind, rows_file, directory / f"{kind}.yaml")) for kind in ("completion_nll", "generation")]


def test_an_adapter_changes_the_result_as_in_torch(tiny_model, adapter, tasks):
    plain, _ = metrics_of(tiny_model, tasks[0], limit=13)
    tuned, _ = metrics_of(tiny_model, tasks[0], adapter, limit=13)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).merge_and_unload()
    assert tuned["metrics"]["nll"]["value"] == pytest.approx(direct_nll(model, completions(tokenizer, 13)), rel=1e-4)
    change = tuned["metrics"]["nll"]["value"] - plain["metrics"]["nll"]["value"]
    assert abs(change) > 0.01  # far beyond the tolerance above, which is 0.0005


def test_an_adapter_with_other_keys_is_refused(tiny_model, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = {key.replace("layers.2", "layers.9"): value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EmlocError, match="does not fit"), pytest.warns(UserWarning, match="missing adapter keys"):
        load_system(tiny_model, tmp_path / "other")


@pytest.mark.parametrize("copied", [True, False])
def test_a_lora_on_the_head_may_lack_peft_s_copy_of_it(tiny_model, tmp_path, copied):
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    copy = tensors.pop("base_model.model.lm_head.base_layer.weight")
    save_file(tensors | ({"base_model.model.lm_head.base_layer.weight": copy} if copied else {}), file)
    assert load_system(tiny_model, adapter)


@pytest.fixture(scope="module", params=["here", *thorough("processes")])
def compared(request, tiny_model, adapter, tasks, tmp_path_factory):
    """Two systems, evaluated in this process, or each in one of its own."""
    output = tmp_path_factory.mktemp("evaluations") / "comparison"
    systems = [system("base", tiny_model), system("tuned", tiny_model, adapter)]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "here":
            patch_calls(patch)
        return systems, output, evaluate(systems, tasks, output, limit=5)


def test_systems_are_compared_and_published(compared, tiny_model, tasks):
    systems, output, results = compared
    assert list(results["systems"]) == ["base", "tuned"]
    for candidate in systems:
        measured, _ = metrics_of(tiny_model, tasks[0], candidate.adapter, limit=5)
        assert results["systems"][candidate.name]["nll"] == pytest.approx(measured["metrics"]["nll"]["value"], rel=1e-5)
        assert results["systems"][candidate.name]["peak_bytes"] > 1e8
    assert results["metrics"]["nll"] == {"task": "completion_nll", "higher_is_better": False}
    assert results["tasks"]["generation"] == {"output_type": "generate_until", "rows": 5}
    assert "| tuned |" in (output / "table.md").read_text()
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(sample["row"], sample["system"]) for sample in samples[:3]] == [
        (0, "base"), (0, "tuned"), (1, "base")
    ]  # fmt: skip
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_a_finished_evaluation_is_not_run_again(compared, tasks, monkeypatch):
    systems, output, results = compared
    monkeypatch.setattr(evaluation, "call", lambda *_, **__: pytest.fail("evaluated again"))
    assert evaluate(systems, tasks, output, limit=5) == results
    with pytest.raises(EmlocError, match="limit was 5 and is now 6"):
        evaluate(systems, tasks, output, limit=6)


def test_a_recipe_shows_the_table_once_at_its_end(compared, tasks, capsys):
    systems, output, _ = compared
    request = make_request("eval", systems=tuple(systems), tasks=tuple(tasks), output=output, limit=5)
    perform(request.to_json(), lambda _: None)
    assert "lower is better" not in "".join(capsys.readouterr())


def part(nll):
    metrics = {"nll": {"value": nll, "stderr": 0.1, "higher_is_better": False}}
    return {
        "tasks": {"completion_nll": {"output_type": "loglikelihood", "rows": 3, "metrics": metrics}},
        "samples": [], "seconds": 1.0, "peak_bytes": 5,
    }  # fmt: skip


def test_systems_that_are_done_are_kept_when_interrupted(tiny_model, adapter, tasks, tmp_path, monkeypatch):
    systems = [system("base", tiny_model), system("full_lora", tiny_model, adapter)]
    ran = []

    def interrupted(_function, arguments, **_):
        ran.append("full_lora" if arguments["adapter"] else "base")
        if len(ran) == 2:
            raise KeyboardInterrupt
        return iter([part(float(len(ran)))])

    monkeypatch.setattr(evaluation, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(systems, tasks[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    results = evaluate(systems, tasks[:1], tmp_path / "out")
    assert ran == ["base", "full_lora", "full_lora"]
    assert [row["nll"] for row in results["systems"].values()] == [1.0, 3.0]


FAILURES = {
    "a mistake": (EmlocError("It does not fit."), "", r"mine cannot be evaluated: It does not fit\.$"),
    "a kill": (ProcessDiedError("f", -9), "", "mine failed: it was killed by signal 9"),
    "an exception": (
        ProcessDiedError("f", 1),
        "Traceback ...\nRuntimeError: no space",
        r"mine failed: RuntimeError: no space .*\.mine\.log",
    ),
    "silence": (ProcessDiedError("f", 0), "", "mine failed: no output"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_process_is_one_error_and_keeps_what_is_done(failure, tiny_model, tasks, tmp_path, monkeypatch):
    systems, ran = [system("base", tiny_model), system("mine", tiny_model)], []
    error, output, message = FAILURES[failure]

    def call(_function, _arguments, *, log):
        ran.append(log.name)
        log.write_text(output)
        if len(ran) == 2:
            raise error
        return iter([part(float(len(ran)))])

    monkeypatch.setattr(evaluation, "call", call)
    with pytest.raises(EmlocError, match=message):
        evaluate(systems, tasks, tmp_path / "out")
    results = evaluate(systems, tasks, tmp_path / "out")
    assert ran == [".base.log", ".mine.log", ".mine.log"]
    assert [row["nll"] for row in results["systems"].values()] == [1.0, 3.0]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")} == set()


def test_nothing_is_left_of_an_evaluation_in_which_nothing_was_done(tiny_model, tasks, tmp_path, monkeypatch):
    def call(*_, log, **__):
        log.write_text("")
        raise EmlocError("It does not work.")

    monkeypatch.setattr(evaluation, "call", call)
    with pytest.raises(EmlocError, match="base cannot be evaluated"):
        evaluate([system("base", tiny_model)], tasks, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_systems_follow_from_the_directories():
    base, emulator, adapter, corrected = ("base", "emulator", Path("adapter"), Path("corrected"))
    systems = canonical_systems(base=base, emulator=emulator, adapter=adapter, corrected=corrected)
    assert systems == [
        system("base", base), system("emulator", emulator), system("emulator+lora", emulator, adapter),
        system("base+uncorrected", base, adapter), system("base+corrected", base, corrected),
    ]  # fmt: skip
    assert canonical_systems(base=base) == [system("base", base)]
    with pytest.raises(EmlocError, match="Add --base"):
        canonical_systems(emulator=emulator, corrected=corrected)
    with pytest.raises(EmlocError, match="needs a model"):
        canonical_systems(adapter=adapter)


@pytest.fixture(scope="module")
def foreign(tiny_model, tmp_path_factory):
    """Another model of the same shape."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.lm_head.weight.data += 1
    directory = tmp_path_factory.mktemp("models") / "foreign"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def write_manifest(adapter, tmp_path):
    """Return a function that copies the adapter with the manifest of a stage that made it for some model."""

    def write(kind, key, model, **more):
        directory = shutil.copytree(adapter, tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}")
        request = {key: Checkpoint(model).fingerprint(Inputs()), **more}
        (directory / "emloc.json").write_text(json.dumps({"kind": kind, "request": request}))
        return directory

    return write


def test_an_adapter_in_the_place_of_another_is_refused(
    tiny_model, tiny_emulator, adapter, write_manifest, tasks, tmp_path
):
    corrected = write_manifest("corrected-adapter", "base", tiny_model, emulator="its fingerprint")
    tuned = write_manifest("adapter", "model", tiny_emulator)
    served = write_manifest("served-adapter", "base", tiny_model, emulator="its fingerprint")
    full = write_manifest("adapter", "model", tiny_model)

    def compare(**adapters):
        systems = canonical_systems(base=str(tiny_model), emulator=str(tiny_emulator), **adapters)
        return Evaluate(make_request("eval", systems=systems, tasks=tasks, output=tmp_path / "out")).describe()

    assert compare(adapter=tuned, corrected=corrected, polished=full, full_lora=full)
    assert compare(adapter=adapter, full_lora=adapter)  # not EMLoC's: unknown
    for kind in ("corrected-adapter", "served-adapter"):  # copies of what was trained on the base
        assert compare(full_lora=write_manifest(kind, "base", tiny_model))
    for refused, message in (
        ({"corrected": tuned}, f"--corrected {tuned} is not corrected"),
        ({"corrected": adapter}, f"--corrected {adapter} is not corrected"),
        ({"adapter": corrected}, f"--adapter {corrected} is corrected"),
        ({"adapter": full}, f"{full} was made for a model other than {tiny_emulator}"),
        ({"full_lora": tuned}, f"{tuned} was made for a model other than {tiny_model}"),
        ({"polished": tuned}, f"{tuned} was made for a model other than {tiny_model}"),
        ({"full_lora": corrected}, f"{corrected} was made for a model other than {tiny_model}"),
        ({"full_lora": served}, f"{served} was made for a model other than {tiny_model}"),
    ):
        with pytest.raises(EmlocError, match=message):
            compare(**refused)


@pytest.mark.parametrize("in_the_hubs_cache", [False, True])
def test_an_adapter_of_the_base_in_four_bits_is_on_the_base(
    in_the_hubs_cache, tiny_model, write_manifest, tasks, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    directory = tmp_path / "hub" / "models--some--packed"
    packed = save_in_four_bits(tiny_model, directory / "snapshots" / ("c" * 40))
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("c" * 40)
    tuned, named = write_manifest("adapter", "model", packed), "some/packed" if in_the_hubs_cache else str(packed)
    write_json(tuned / "adapter_config.json",
               read_json(tuned / "adapter_config.json") | {"base_model_name_or_path": named})  # fmt: skip
    systems = canonical_systems(base=str(tiny_model), full_lora=tuned)
    compared = Evaluate(make_request("eval", systems=systems, tasks=tasks, output=tmp_path / "out"))
    assert compared.describe()
    write_json(packed / "config.json", read_json(packed / "config.json") | {MARK: "nf4"})  # an emulator of it
    with pytest.raises(EmlocError, match=f"{tuned} was made for a model other than {tiny_model}"):
        compared.describe()


@pytest.mark.parametrize(
    ("option", "kind", "key"),
    [
        ("--corrected", "corrected-adapter", "base"),
        ("--adapter", "adapter", "model"),
        ("--full-lora", "adapter", "model"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_an_adapter_of_another_model_is_refused(
    option, kind, key, dry, tiny_model, tiny_emulator, foreign, write_manifest, tasks, tmp_path
):
    strange = write_manifest(kind, key, foreign)
    models = ["--base", str(tiny_model), "--emulator", str(tiny_emulator)]
    argv = [*tasks, *models, option, str(strange), "-o", str(tmp_path / "out"), *dry]
    with pytest.raises(EmlocError, match=f"{strange} was made for a model other"):
        CliRunner().invoke(command, argv, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
    free = [*tasks, "--system", f"any={tiny_model}+{strange}", "-o", str(tmp_path / "out"), "--dry-run"]
    assert "any" in CliRunner().invoke(command, free, catch_exceptions=False).stdout


def test_a_dry_run_checks_everything_and_writes_nothing(tiny_model, adapter, tasks, tmp_path):
    argv = [*tasks, "--base", str(tiny_model), "--full-lora", str(adapter), "-o", str(tmp_path / "out"), "--dry-run"]
    content = json.loads(CliRunner().invoke(command, [*argv, "--json"], catch_exceptions=False).stdout)
    assert content["systems"]["full_lora"] == {"model": str(tiny_model), "adapter": str(adapter)}
    assert content["tasks"] == {Path(task).stem: task for task in tasks}
    with pytest.raises(EmlocError, match="There is no directory nowhere"):
        CliRunner().invoke(command, [*argv, "--system", f"a={tiny_model}+nowhere"], catch_exceptions=False)
    with pytest.raises(EmlocError, match="'a' is not NAME=MODEL"):
        CliRunner().invoke(command, [*argv, "--system", "a"], catch_exceptions=False)
    with pytest.raises(EmlocError, match="--data has no effect without --new-task"):
        CliRunner().invoke(command, [*argv, "--data", "rows.jsonl"], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_paths_of_a_system_may_have_a_plus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a", "a+b", "c+d"):
        Path(path).mkdir()
    systems = []
    monkeypatch.setattr("emloc_core.cli.eval.run", lambda request, **_: systems.extend(request.systems))
    paths = ["a+b", "a+b+c+d", "a+c+d", "a+b+nowhere", "org/model+c+d", "nowhere+x+y"]
    argv = [part for number, path in enumerate(paths) for part in ("--system", f"s{number}={path}")]
    CliRunner().invoke(command, ["task", *argv, "-o", "out"], catch_exceptions=False)
    assert [(system.model, str(system.adapter)) for system in systems] == [
        ("a+b", "None"),
        ("a+b", "c+d"),
        ("a", "c+d"),
        ("a", "b+nowhere"),
        ("org/model", "c+d"),
        ("nowhere", "x+y"),
    ]


def test_the_command_writes_a_task_file(rows_file, tmp_path):
    task = tmp_path / "a loss.yaml"
    argv = ["--new-task", "completion_nll", "--data", str(rows_file), "-o", str(task)]
    output = CliRunner().invoke(command, argv, catch_exceptions=False).output
    assert f"emloc eval '{task}' --base MODEL" in output
    assert find_task(str(task), Inputs()).name == "a_loss"
    with pytest.raises(EmlocError, match="already exists"):
        CliRunner().invoke(command, argv, catch_exceptions=False)
    for more in (
        "a.yaml",
        "--dry-run",
        "--json",
        "--base=model",
        "--system=a=b",
        "--limit=2",
        "--batch-size=8",
        "--no-chat",
    ):
        with pytest.raises(EmlocError, match="only writes a task file"):
            CliRunner().invoke(command, [*argv, more], catch_exceptions=False)


def test_systems_and_tasks_of_one_name_are_refused(tiny_model, tasks, tmp_path):
    with pytest.raises(EmlocError, match="Two systems are called 'a'"):
        evaluate([system("a", tiny_model)] * 2, tasks, tmp_path / "out")
    with pytest.raises(EmlocError, match="Two tasks are called 'generation'"):
        evaluate([system("a", tiny_model)], [tasks[1]] * 2, tmp_path / "out")
    with pytest.raises(EmlocError, match="is not a name for a system"):
        evaluate([system("../a", tiny_model)], tasks, tmp_path / "out")


def test_names_are_looked_up_before_a_model_is_fetched_and_not_for_a_finished_evaluation(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["hellaswag"]))
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "open_checkpoint", lambda _: pytest.fail("fetched"))
        with pytest.raises(EmlocError, match="Did you mean 'hellaswag'"):
            evaluate([system("a", "org/model")], ["hellaswagg"], tmp_path / "out")
        with pytest.raises(EmlocError, match="Two systems are called 'a'"):
            evaluate([system("a", "org/model")] * 2, ["hellaswag"], tmp_path / "out")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: pytest.fail("listed again"))
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / MANIFEST, {})
    Evaluate(make_request("eval", systems=(system("a", tiny_model),), tasks=("hellaswag",), output=tmp_path / "out"))


def test_layers_that_do_not_fit_wait_elsewhere(tiny_model, adapter, tmp_path, monkeypatch):
    ids = torch.arange(3, 11)[None]
    in_memory, _ = load_system(tiny_model, adapter)
    # Without a GPU, it is the CPU's memory that is too small, and layers wait on disk: PEFT copies them to where it is.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_require_memory", lambda _: None)
    elsewhere = {"offload_folder": tmp_path / "waiting"}
    monkeypatch.setattr(loading, "_parts", lambda nbytes: {"cpu": nbytes // 2})
    for name in ("load_model", "load_lora"):
        monkeypatch.setattr(pretrained, name, partial(getattr(pretrained, name), **elsewhere))
    apart, _ = load_system(tiny_model, adapter)
    assert any(parameter.is_meta for parameter in apart.parameters())
    assert torch.equal(apart(input_ids=ids).logits, in_memory(input_ids=ids).logits)


def test_layers_never_wait_on_disk(tiny_model, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_parts", lambda nbytes: {"cpu": nbytes // 2})
    with pytest.raises(EmlocError, match="too little free memory"):
        load_system(tiny_model, adapter)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("nbytes", "parts"), [(90, None), (91, {0: 60, "cpu": 70}), (130, {0: 60, "cpu": 70}), (131, EmlocError)]
)
def test_how_much_of_a_model_goes_where(nbytes, parts, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (100, 200))
    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda _: 1.0)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=70, total=100))
    if parts is EmlocError:
        with pytest.raises(EmlocError, match="have room for"):
            loading._parts(nbytes)
    else:
        assert loading._parts(nbytes) == parts
