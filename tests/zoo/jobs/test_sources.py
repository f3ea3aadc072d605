"""Sources that a user names become jobs, and nothing leaves its directory."""

import json
import re
import shutil

import pytest
from datasets import Dataset, DatasetDict
from support.driver import ForkingDriver
from support.internvl_chat import InternVLChat, chat_config, randomise, save_source, text_config
from support.jobs import import_job
from support.processes import drive, files, plan_here

from emloc_core.errors import EmlocError
from emloc_core.files.output import TIMING
from emloc_core.requests import ImportRequest
from emloc_core.settings import CompressSettings
from emloc_core.standins import RECOMMENDED
from emloc_core.zoo.jobs.job import ZooJob, describe_change, slug, unique
from emloc_core.zoo.jobs.planning import plan
from emloc_core.zoo.jobs.sources import Defaults, resolve
from emloc_core.zoo.state.store import Store


@pytest.fixture
def models(tmp_path):
    """Two model directories, one of which has lost its config, and a directory that is no model."""
    root = tmp_path / "models"
    for name in ("whole", "damaged", "notes"):
        (root / name).mkdir(parents=True)
    (root / "whole" / "config.json").write_text("{}")
    (root / "damaged" / "model.safetensors").write_bytes(b"")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return root


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_directory_of_models_is_a_job_each_in_order(models):
    jobs = resolve([str(models)], Defaults(data="org/rows", compress={"ratio": 0.3}, threads=2))
    assert [(job.name, job.model) for job in jobs] == [
        ("damaged", str(models / "damaged")),
        ("whole", str(models / "whole")),
    ]
    assert {(job.data, job.compress.ratio, job.threads, job.train) for job in jobs} == {("org/rows", 0.3, 2, None)}


def test_one_model_twice_gets_two_names(models):
    assert [job.name for job in resolve([str(models / "whole")] * 3, Defaults())] == ["whole", "whole-2", "whole-3"]


def test_a_file_of_jobs(models, monkeypatch):
    file = write(
        models.parent / "jobs.toml",
        """
        [[job]]
        model = "models/whole"
        data = "rows.jsonl"
        ratio = 0.5
        compress = { samples = 7 }
        train = { steps = 3 }
        merge = true
        threads = 2
        [[job]]
        name = "other"
        model = "organisation/model@abc"
        [[job]]
        model = "models/whole"
        data = "rows.jsonl"
        train = false
        """,
    )
    monkeypatch.chdir(models)
    first, other, third = resolve([file], Defaults(data="../rows.jsonl", compress={"samples": 9, "seed": 3}))
    assert (first.name, first.model, first.data) == (
        "whole", str(models / "whole"), str(models.parent / "rows.jsonl")
    )  # fmt: skip
    assert (first.compress.ratio, first.compress.samples, first.compress.seed) == (0.5, 7, 3)
    assert (first.train.steps, first.merge, first.threads) == (3, True, 2)
    assert (other.name, other.model, other.train) == ("other", "organisation/model@abc", None)
    assert other.data.endswith("rows.jsonl")
    assert other.data.startswith("/")
    assert (third.name, third.train) == ("whole-2", None)


@pytest.mark.parametrize("key", ["model", "data", "test", "tasks"])
@pytest.mark.parametrize("path", ["../outside", "/etc", "~/outside", "models/../../outside", "link"])
@pytest.mark.usefixtures("models")
def test_a_file_of_jobs_cannot_leave_its_directory(tmp_path, key, path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "models")
    values = {"model": '"."', "data": '"org/rows"', "test": None, "tasks": None}
    values[key] = f'["{path}"]' if key in ("test", "tasks") else f'"{path}"'
    if values["tasks"]:
        values["eval"] = f"{{ tasks = {values.pop('tasks')} }}"
    text = "[[job]]\n" + "".join(f"{name} = {value}\n" for name, value in values.items() if value)
    with pytest.raises(EmlocError, match=r"jobs.toml names '.*', outside its directory"):
        resolve([write(inside / "jobs.toml", text)], Defaults())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[job]]\nmodle = 'a/b'", r"no setting 'job.0.modle'. Did you mean 'model'"),
        ("[[job]]\nmodel = 'a/b'\ntrain = { rank = 4 }", r"no setting 'job.0.train.rank'. Did you mean 'lora_rank'"),
        ("[[job]]\nmodel = 'a/b'\nname = '../x'", "name"),
        ("[[job]]\nmodel = 'a/b'\nratio = 2.0", "ratio"),
        ("[[job]]\nmodel = 'a/b'\nratio = 0.5\ncompress = { ratio = 0.4 }", "ratio or compress.ratio, not both"),
        ("[[job]]\nmodel = 'a/b'\ncompress = { ration = 0.4 }", "Did you mean 'ratio'"),
        ("[[job]]\nmodel = 'a/b'\ndata = 'a/b'\ncompress = { selection = 0 }", "holds out none"),
        ('[[job]]\nmodel = "a\\u0000"', "cannot be a file's name"),
        ("job = 3", "job"),
        ("", "job is missing"),
        ("[[job", "not valid TOML"),
    ],
)
def test_a_wrong_file_of_jobs_is_one_error(tmp_path, text, message):
    with pytest.raises(EmlocError, match=message):
        resolve([write(tmp_path / "jobs.toml", text)], Defaults())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "does not exist"),
        ("nowhere/", "does not exist"),
        ("nowhere.toml", "There is no file of jobs at"),
        ("Qwen/Qwen2.5-7BB", "Did you mean 'Qwen/Qwen2.5-7B'"),
        ("no-such-*", "No entry of the registry matches"),
        ("nowhere", "no directory nowhere.*Give a model directory, .* file of jobs, which may name .* the hub"),
    ],
)
def test_what_is_no_source(source, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EmlocError, match=message):
        resolve([source], Defaults())


def test_a_directory_without_models(tmp_path):
    with pytest.raises(EmlocError, match="holds no model"):
        resolve([str(tmp_path)], Defaults())


def test_entries_take_the_rows_of_all_and_a_glob_is_many(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in ("first", "second"):
        lines = [f"id = 'mine/{name}'", "family = 'llama'", "checkpoint = 'checkpoint'"]
        lines += ["[presets.default]", "samples = 5", "[config]", "model_type = 'llama'"]
        (tmp_path / f"{name}.toml").write_text("\n".join(lines))
    first, second = resolve(["mine/*"], Defaults(data="org/rows", registry=[tmp_path]))
    assert (first.name, first.model, first.data) == ("first", str(tmp_path / "checkpoint"), "org/rows")
    assert first.compress.settled() == CompressSettings(kind="nf4", samples=5)
    assert (second.name, second.train, second.merge) == ("second", None, False)


@pytest.mark.thorough
def test_the_kind_is_chosen_by_a_memory_target():
    (job,) = resolve(["SmolLM2-135M"], Defaults(compress={"kind": "auto"}, preset="inference"))
    assert job.compress.kind in RECOMMENDED
    (job,) = resolve(["SmolLM2-135M"], Defaults(compress={"kind": "trellis"}))
    assert (job.compress.kind, job.compress.ratio) == ("trellis", None)


@pytest.mark.slow
def test_an_entry_in_another_layout_is_rewritten_first(tmp_path, rows_file):
    config = chat_config(text_config("qwen2"))
    source = save_source(tmp_path / "source", randomise(InternVLChat(config)), config)
    native = import_job(source, tmp_path / "native").run()
    lines = ['id = "mine/chat"', 'family = "internvl"', 'layout = "internvl_chat"', 'checkpoint = "source"']
    lines += ["[presets.default]", "[config]", 'model_type = "internvl"']
    (tmp_path / "entry.toml").write_text("\n".join(lines))
    settings = {"ratio": 0.5, "samples": 4, "selection": 0}
    defaults = Defaults(data=str(rows_file), compress=settings, registry=[tmp_path / "entry.toml"], offline=True)
    jobs = [*resolve(["mine/chat"], defaults), *resolve([str(native)], defaults)]
    (chat, needs), (other, of_native) = plan(jobs, tmp_path)
    assert chat != other
    assert needs.base == of_native.base
    assert needs.disk - needs.emulator == of_native.disk - of_native.emulator + needs.base
    assert ForkingDriver(tmp_path / "log", drive, tmp_path / "zoo", jobs[:1]).wait() == 0
    (record,) = Store(tmp_path / "zoo").records()
    assert record.state == "done", record
    assert set(record.result["stages"]) == {"native", "emulator"}
    assert record.result["family"] == "internvl"
    assert all(0 < linear["relative_error"] < 1 for linear in record.result["linears"] if linear["rank"])
    ours, theirs = (
        {name: content for name, (content, *_) in files(directory).items() if name != TIMING}
        for directory in (tmp_path / "zoo/jobs/chat/native", native)
    )
    assert ours == theirs


def test_a_model_of_the_registry_in_another_layout_is_rewritten_first(tmp_path):
    name = "OpenGVLab/InternVL2_5-1B"
    file = write(tmp_path / "jobs.toml", f"[[job]]\nmodel = '{name}@main'\n")
    for source in (name, file):
        (job,) = resolve([source], Defaults(data="org/rows"))
        first, second = job.stages(tmp_path)
        assert first.request == ImportRequest(source=job.model, output=tmp_path / "native")
        assert second.request.model == str(tmp_path / "native")


@pytest.mark.parametrize("data", ["rows.jsonl", "no/rows.json", "./rows", "/no/rows", "~/rows", "a/b/c"])
def test_rows_that_are_not_there(models, data, monkeypatch):
    monkeypatch.chdir(models)
    with pytest.raises(EmlocError, match=f"There are no rows at {data}"):
        resolve([str(models)], Defaults(data=data))


def test_a_download_is_counted_unless_it_is_there(tmp_path, monkeypatch):
    hub, name = tmp_path / "hub", "HuggingFaceTB/SmolLM2-135M"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    job = ZooJob(name="a", model=f"{name}@main", data="org/rows")
    ((_, fetched),) = plan_here([job], tmp_path)
    ((_, offline),) = plan_here([job.model_copy(update={"offline": True})], tmp_path)
    assert fetched.disk == offline.disk + fetched.base
    repository = hub / f"models--{name.replace('/', '--')}"
    for file, content in {"refs/main": "abc", "snapshots/abc/model.safetensors": ""}.items():
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(content)
    ((_, cached),) = plan_here([job], tmp_path)
    assert cached == offline


def test_names_are_directories_anywhere():
    assert slug("org/Model 1.5B@main") == "Model-1.5B"
    assert slug("/models@v2/first") == "first"
    assert slug("/models/../..") == "models"
    assert slug("///") == "model"
    assert slug("x" * 300) == "x" * 90
    jobs = [ZooJob(name=name, model="a/b") for name in ("A", "a", "a-2")]
    assert [job.name for job in unique(jobs)] == ["A", "a-2", "a-2-2"]


def test_a_name_does_not_depend_on_what_is_named_before(models):
    """The same command with its sources in another order found the finished job of another model."""
    shutil.copytree(models / "whole", models.parent / "others/whole")
    sources = [str(models / "whole"), str(models.parent / "others")]
    names = [{job.model: job.name for job in resolve(order, Defaults())} for order in (sources, sources[::-1])]
    assert names[0] == names[1]
    assert all(re.fullmatch("whole-[0-9a-f]{6}", name) for name in names[0].values())
    assert len(set(names[0].values())) == 2


def test_a_fingerprint_is_of_all_that_decides_the_outputs(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")
    job = ZooJob(name="a", model="org/model@1", data=str(rows))

    def changed(**settings):
        return ZooJob(**{**job.model_dump(), **settings}).fingerprint(tmp_path)

    before = job.fingerprint(tmp_path)
    assert changed(name="b", offline=True) == before
    (tmp_path / "copy.jsonl").write_text("1")
    others = [
        changed(model="org/model@2"), changed(threads=2), changed(compress={"ratio": 0.5}), changed(train={}),
        changed(layout="published"),
    ]  # fmt: skip
    rows.write_text("2")
    others.append(changed())
    assert len({before, *others}) == 7


def test_a_fingerprint_is_of_what_rows_say_and_show(tmp_path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    for name in ("rows.jsonl", "copy.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"images": ["shown.png"], "messages": turns}))

    def fingerprint(name="rows.jsonl"):
        job = ZooJob(name="a", model="org/model", data=str(tmp_path / name), test=[str(tmp_path / "test.jsonl")])
        return job.fingerprint(tmp_path)

    fingerprints = []
    for image in (b"one", b"two"):
        (tmp_path / "shown.png").write_bytes(image)
        fingerprints.append(fingerprint())
        assert fingerprint("copy.jsonl") == fingerprints[-1]
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": turns}))
    assert len({*fingerprints, fingerprint()}) == 3


def test_a_fingerprint_is_of_what_a_directory_holds(tmp_path):
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"shown")
    fingerprints = []
    for text in ("one", "two"):
        (folder / "a.txt").write_text(text)
        shutil.rmtree(saved, ignore_errors=True)
        DatasetDict({"train": Dataset.from_dict({"text": [text]})}).save_to_disk(saved)
        jobs = [ZooJob(name="a", model="org/model", data=str(directory)) for directory in (folder, saved)]
        fingerprints += [job.fingerprint(tmp_path) for job in jobs]
        assert [job.fingerprint(tmp_path) for job in jobs] == fingerprints[-2:]
    assert len(set(fingerprints)) == 4
    stamps = jobs[0].stamps()
    (folder / ".DS_Store").touch()  # as file managers make it
    assert jobs[0].stamps() == stamps
    (folder / "README.md").touch()  # of a model: planning does not count it
    assert jobs[0].stamps() == stamps
    (folder / "b.txt").touch()
    assert jobs[0].stamps() != stamps


def test_a_fingerprint_is_of_what_tasks_ask(tmp_path):
    task, rows = tmp_path / "task.yaml", tmp_path / "rows.jsonl"
    job = ZooJob(name="a", model="org/model", data="org/rows", train={}, eval={"tasks": [str(task), "arc_easy"]})
    fingerprints = [job.fingerprint(tmp_path)]
    task.write_text("task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n")
    fingerprints.append(job.fingerprint(tmp_path))
    for question in ("one", "two"):
        rows.write_text(json.dumps({"question": question}))
        fingerprints.append(job.fingerprint(tmp_path))
        assert job.fingerprint(tmp_path) == fingerprints[-1]
    task.write_text(task.read_text() + "doc_to_text: question\n")
    assert len({*fingerprints, job.fingerprint(tmp_path)}) == 5


def test_smaller_is_what_the_stage_can_give():
    job = ZooJob(name="a", model="a/b", data="a/b", train={"batch_size": 8}, eval={"tasks": ["x"]})
    assert describe_change(job, job.smaller("emulator")) == "compress.samples default -> 32"
    assert job.smaller("emulator").smaller("emulator").compress.samples == 16
    change = describe_change(job, job.smaller("adapter"))
    assert change == "train.batch_size 8 -> 4, train.accumulation 1 -> 2"
    assert describe_change(job, job.smaller("evaluation")) == "eval.batch_size 8 -> 4"
    assert job.smaller("merged") is None
    assert ZooJob(name="a", model="a/b", compress={"samples": 1}).smaller("emulator") is None
