"""Every kind of emulator, from its files to the merged model; and what is particular to each."""

import json
import shutil
from functools import partial
from itertools import product

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.jobs import compress_job, correct_job, merge_job, train_job
from support.marks import most_thorough
from support.models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.candidates import CANDIDATES
from emloc_core.algorithms import feedback
from emloc_core.algorithms.factorize import factorize, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.conformance.tiny import TinyModel
from emloc_core.conformance.written import adapter_keys, correction, merge, ties, trains
from emloc_core.data.rows import load_rows
from emloc_core.emulator.decompose import Decomposition
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.errors import DiskFullError, EmlocError
from emloc_core.family import TINY
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.lora import WEIGHTS
from emloc_core.files.manifest import read_manifest
from emloc_core.files.pretrained import load_lora
from emloc_core.hookspecs import hookimpl
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.model.hooks import forward_hooks
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings, CorrectSettings, TrainSettings
from emloc_core.standins import (
    NF4,
    FourBitLowRank,
    LowRank,
    Trellis,
    TwoBitLowRank,
    low_rank_two_bits,
    nf4,
)
from emloc_core.standins.layer import product as packed_product
from emloc_core.standins.low_rank_nf4 import rounded
from emloc_core.tuning.trainer import LoraTrainer

FORMATS = (LowRank, NF4, FourBitLowRank, TwoBitLowRank, Trellis)
KINDS = {kind.name: kind for kind in FORMATS}
SETTINGS = {
    "low-rank": {"ratio": 0.6},
    "nf4": {},
    "low-rank-nf4": {"ratio": 0.6},
    "low-rank-2-bit": {"ratio": 0.6},
    "trellis": {},
}


#: All kinds are resumed by the same code.
ONE_KIND = pytest.mark.parametrize("trained", most_thorough(KINDS, "low-rank-nf4"), indirect=True)
#: One kind of a fixed size and one with ranks.
TWO_KINDS = pytest.mark.parametrize(
    "trained",
    most_thorough(KINDS, "trellis", "low-rank-nf4"),
    indirect=True,
)


def compression(kind, model, rows, output, size=None):
    settings = CompressSettings(kind=kind, samples=12, selection=6, **(SETTINGS[kind] if size is None else size))
    return compress_job(model, rows, output, settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_size_of_its_own(kind, tiny_model, rows_file, tmp_path):
    job = compression(kind, tiny_model, rows_file, tmp_path / "emulator", size={})
    assert job.settings.ratio == (KINDS[kind].ratios.default if KINDS[kind].ratios else None)
    assert job.plan.ranks
    if KINDS[kind].ratios:
        explicit = compression(
            kind, tiny_model, rows_file, tmp_path / "emulator", {"ratio": KINDS[kind].ratios.default}
        )
        assert explicit.output.request == job.output.request
    else:
        with pytest.raises(EmlocError, match="has no ratio"):
            compression(kind, tiny_model, rows_file, tmp_path / "emulator", {"ratio": 0.6})


@pytest.fixture(scope="module", params=most_thorough(KINDS, "low-rank", "nf4", "low-rank-2-bit", "trellis"))
def trained(request, tiny_model, rows_file, tmp_path_factory):
    """A kind, its emulator, and a LoRA trained on it."""
    directory = tmp_path_factory.mktemp(request.param)
    emulator = compression(request.param, tiny_model, rows_file, directory / "emulator").run()
    train = TrainSettings(steps=8, batch_size=4, learning_rate=1e-2, save_steps=4, logging_steps=4)
    adapter = train_job(emulator, rows_file, directory / "adapter", train).run()
    return KINDS[request.param](), emulator, adapter


def test_it_trains_is_corrected_and_merges(trained, tiny_model, tmp_path):
    kind, emulator, adapter = trained
    log = json.loads((adapter / "log.json").read_text())
    assert log[-1]["loss"] < log[0]["loss"]
    base = Checkpoint(tiny_model)
    corrected = correct_job(adapter, base, tmp_path / "corrected", CorrectSettings(clamp="none")).run()
    # As in training: to infer on a CPU, bitsandbytes rounds what it multiplies.
    tuned = load_lora(AutoModelForCausalLM.from_pretrained(emulator, dtype="auto"), adapter).train()
    carried = load_lora(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto"), corrected).eval()
    with torch.no_grad():  # on the LoRA's inputs the base answers as the tuned emulator did
        for path, lora in Adapter(adapter).loras.items():
            name = f"base_model.model.{path}"
            inputs = lora.a.float()
            expected, actual = (model.get_submodule(name)(inputs).float() for model in (tuned, carried))
            assert torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max())), (kind.name, path)
    merged = merge_job(corrected, base, tmp_path / "merged").run()
    merged_model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(merged_model(ids).logits, carried(ids).logits, atol=1e-4)


@TWO_KINDS
def test_the_clamp_is_chosen(trained, tiny_model, tmp_path):
    _, _, adapter = trained
    output = correct_job(adapter, tiny_model, tmp_path / "corrected", CorrectSettings()).run()
    assert [
        (candidate["clamp"], candidate["scale"]) for candidate in read_manifest(output)["result"]["candidates"]
    ] == list(CANDIDATES)


def test_what_is_planned_is_what_is_written(trained, tiny_model, rows_file, tmp_path):
    kind, emulator, _ = trained
    result = read_manifest(emulator)["result"]
    before = compression(kind.name, tiny_model, rows_file, tmp_path / "again").describe()
    shards = [load_file(shard) for shard in sorted(emulator.glob("model-*.safetensors"))]
    sizes = {key: tensor.nbytes for shard in shards for key, tensor in shard.items()}
    unknown = sum(size for key, size in sizes.items() if key.endswith("bitsandbytes__nf4"))  # a description in JSON
    written = sum(sizes.values()) - unknown
    # Ranks are shared out by calibration, short of less than one step.
    step = {"low-rank": 4 * (32 + 64), "low-rank-nf4": 9 * (32 + 64) // 16, "low-rank-2-bit": 32 + 64}.get(kind.name, 0)
    assert abs(before["emulator_bytes"] - written) <= step
    assert result["bytes"]["emulator"] == sum(sizes.values())


@ONE_KIND
def test_it_is_the_same_after_an_interruption(trained, tiny_model, rows_file, tmp_path):
    kind, emulator, _ = trained
    job = compression(kind.name, tiny_model, rows_file, tmp_path / "emulator")

    def interrupt(_path, done, _total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(interrupt)
    again = compression(kind.name, tiny_model, rows_file, tmp_path / "emulator").run()
    for shard in sorted(emulator.glob("*.safetensors")):
        assert (again / shard.name).read_bytes() == shard.read_bytes()


@TWO_KINDS
def test_reported_errors_are_those_of_what_the_model_holds(trained, tiny_model, rows_file, tmp_path):
    """Where no earlier error is to be made up for, which is what targets do; elsewhere the outputs are not far off."""
    kind, _, _ = trained
    dense = {**SETTINGS[kind.name], "keep": "head"}  # packed embeddings have errors too
    emulator = compression(kind.name, tiny_model, rows_file, tmp_path / "emulator", dense).run()
    reported = {linear["path"]: linear["relative_error"] for linear in read_manifest(emulator)["result"]["linears"]}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto")
    # As in training: to infer on a CPU, bitsandbytes rounds what it multiplies.
    small = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").train()
    lost, total = dict.fromkeys(reported, 0.0), dict.fromkeys(reported, 0.0)

    def compare(path):
        def note(_module, args, output):
            exact = args[0] @ base.get_submodule(path).weight.T
            lost[path] += float((output - exact).square().sum())
            total[path] += float(exact.square().sum())

        return note

    with torch.no_grad(), forward_hooks((small.get_submodule(path), compare(path)) for path in reported):
        for sample in compression(kind.name, tiny_model, rows_file, tmp_path / "again", dense).samples:
            small(**sample.inputs("cpu"))
    actual = {path: (lost[path] / total[path]) ** 0.5 for path in reported}
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert [actual[path] for path in first] == pytest.approx([reported[path] for path in first], rel=1e-3)
    assert all(0 < error < 1 for error in reported.values())
    assert all(error < 0.7 for error in actual.values())


def test_without_calibration_weights_are_rounded_as_bitsandbytes_does(tiny_model, rows_file, tmp_path):
    chosen = CompressSettings(kind="nf4", calibration="none", selection=6, keep="head")
    job = compress_job(tiny_model, rows_file, tmp_path / "emulator", chosen)
    assert not job.rows.calibration
    base, small, kind = Checkpoint(tiny_model), Checkpoint(job.run()), NF4()
    for linear in read_manifest(tmp_path / "emulator")["result"]["linears"]:
        key, shape = f"{linear['path']}.weight", (linear["out_features"], linear["in_features"])
        with small.slices(kind.keys(key)) as slices, base.slices([key]) as base_slices:
            tensors, weight = [slices[name][...] for name in kind.keys(key)], base_slices[key][...]
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(tensors[0], codes)
        assert torch.equal(tensors[1], state.absmax)
        restored = kind.read(tensors, shape, torch.float32).weight()
        assert linear["relative_error"] == pytest.approx(float((weight - restored).norm() / weight.norm()), rel=1e-4)


def as_read(fitted, m, n):
    """What bitsandbytes unpacks of a weight in four bits."""
    packed = list(NF4().pack(fitted, torch.float32).values())
    return NF4().read(packed, (m, n), torch.float32).weight()


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 90), n=st.sampled_from([64, 128, 192]), zeros=st.booleans(), seed=st.integers(0, 2**16))
def test_four_bits_fitted_to_rows_are_bitsandbytes_own(m, n, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(m, n, generator=generator), torch.randn(3 * n, n, generator=generator)
    inputs = inputs @ torch.randn(n, n, generator=generator)
    if zeros:  # whole blocks, whose scale is next to 0, and may be rounded below it
        weight[m // 2 :] = 0
    gram = Gram("input", n)
    gram.add(inputs)
    fitted, alone = NF4().fit([weight], gram, [None])[0], NF4().round(weight)
    lost = [
        float(((weight - approximation) @ inputs.T).norm())
        for approximation in (as_read(fitted, m, n), as_read(alone, m, n))
    ]
    assert lost[0] <= 1.01 * lost[1] + 1e-6
    assert fitted.relative_error() == pytest.approx(lost[0] / float((weight @ inputs.T).norm()), rel=1e-2, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 200), rows=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_what_was_rounded_with_feedback_is_packed_as_it_is(m, n, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix, inputs = torch.randn(m, n, generator=generator), torch.randn(rows, n, generator=generator)
    fed_back = rounded([matrix], feedback.Damped(inputs.T @ inputs))[0]
    assert torch.equal(nf4.rounded(fed_back), fed_back)
    assert bool(torch.isfinite(fed_back).all())


@pytest.mark.parametrize("columns", [64, 100, 300])
def test_feedback_lowers_the_error_of_the_outputs(columns):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    inputs = torch.randn(1000, columns, generator=generator) @ mixing
    matrix, gram = torch.randn(40, columns, generator=generator), Gram("input", columns)
    gram.add(inputs)
    fitted, alone = NF4().fit([matrix], gram, [None])[0], NF4().round(matrix)

    def lost(approximation):
        return float(((matrix - approximation) @ inputs.T).norm())

    assert lost(rounded([matrix], feedback.Damped(inputs.T @ inputs))[0]) < 0.7 * lost(nf4.rounded(matrix))
    assert lost(as_read(fitted, 40, columns)) < 0.7 * lost(as_read(alone, 40, columns))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), scale=st.floats(-6, 6), seed=st.integers(0, 2**16))
def test_what_was_packed_is_packed_alike_again(m, n, scale, seed):
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 10**scale
    once = nf4.rounded(matrix)
    assert torch.equal(nf4.rounded(once), once)
    assert (once - matrix).norm() <= 0.3 * matrix.norm()
    codes, scales = nf4.pack(matrix)
    assert (codes.numel(), scales.numel()) == nf4.sizes(m, n)


def test_a_packed_product_and_its_gradient_are_those_of_the_unpacked_matrix():
    matrix = torch.randn(12, 40)
    x = torch.randn(5, 40, requires_grad=True)
    codes, scales = nf4.pack(matrix)
    output = packed_product(x, partial(nf4.unpack, shape=(12, 40), dtype=torch.float32), codes, scales)
    exact = x @ nf4.rounded(matrix).T
    assert torch.allclose(output, exact, atol=1e-5)
    weights = torch.randn(5, 12)
    (gradient,) = torch.autograd.grad((output * weights).sum(), x)
    assert torch.allclose(gradient, weights @ nf4.rounded(matrix), atol=1e-5)


def test_v_makes_up_for_the_rounding_of_u():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(96, 128, generator=generator), torch.randn(400, 128, generator=generator)
    inputs *= torch.linspace(0.1, 3, 128)  # some of them matter more than others
    gram, outputs = Gram("input", 128), Gram("output", 96)
    gram.add(inputs)
    outputs.add(inputs @ weight.T)
    kind = FourBitLowRank()
    (fitted,) = kind.fit([weight], gram, [40])
    exact = factorize(weight, outputs, 40)
    apart = nf4.rounded(exact.u) @ nf4.rounded(exact.v)

    def error(approximation):
        return float(((weight - approximation) @ inputs.T).norm())

    u = nf4.rounded(exact.u)
    one_after_the_other = u @ nf4.rounded(torch.linalg.solve(u.T @ u, u.T @ weight))
    approximated = kind.read(list(kind.pack(fitted, torch.float32).values()), (96, 128), torch.float32).weight()
    assert error(approximated) < error(one_after_the_other) < error(apart)
    assert fitted.relative_error() == pytest.approx(error(approximated) / float((inputs @ weight.T).norm()))
    assert fitted.relative_error() > exact.relative_error()


def test_a_rotation_between_the_factors_lets_feedback_round_them_better(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    outer, right, mixed = torch.linalg.qr(torch.randn(3, 96, 96, generator=generator)).Q
    falling = torch.logspace(0, -2, 96)  # some directions do far more than others
    weight, gram = outer * falling @ right, Gram("input", 96)
    gram.add(torch.randn(400, 96, generator=generator) * falling @ mixed)
    kind = TwoBitLowRank()
    (rotated,) = kind.fit([weight], gram, [40])
    monkeypatch.setattr(low_rank_two_bits, "_rotation", lambda size: torch.eye(size, dtype=torch.float64))
    (plain,) = kind.fit([weight], gram, [40])
    assert rotated.error < 0.8 * plain.error
    read = kind.read(list(kind.pack(rotated, torch.float32).values()), (96, 96), torch.float32)
    assert rotated.error == pytest.approx(output_error(weight, read.weight(), gram.matrix), rel=1e-4)


def test_what_has_no_ranks_has_no_ratio(tiny_model, rows_file, tmp_path):
    base, rows = Checkpoint(tiny_model), load_rows(str(rows_file))
    chosen = CompressSettings(kind="nf4", ratio=0.3, allocator="global", samples=4, selection=2)
    with pytest.raises(EmlocError, match="no ratio, allocator"):
        compress_job(base, rows, tmp_path / "emulator", chosen)
    chosen = CompressSettings(kind="trellis", calibration="none", selection=2)
    with pytest.raises(EmlocError, match=r"kind 'trellis' is always fitted to rows"):
        compress_job(base, rows, tmp_path / "emulator", chosen)


def test_a_kind_of_which_nobody_knows_is_refused(tiny_model, rows_file, tmp_path):
    message = r"emulators: low-rank, low-rank-2-bit, low-rank-nf4, nf4, trellis\."
    with pytest.raises(EmlocError, match=message):
        compress_job(tiny_model, rows_file, tmp_path / "emulator", CompressSettings(kind="nf5"))


def test_linears_that_bitsandbytes_cannot_hold_are_packed_in_a_checkpoint_of_ours(rows_file, tmp_path):
    model = save_tiny_model({"model_type": "falcon", **TINY}, tmp_path / "model")  # its Linears are a subclass
    settings = CompressSettings(kind="nf4", keep="head", samples=4, selection=2)
    emulator = compress_job(model, rows_file, tmp_path / "emulator", settings).run()
    config = json.loads((emulator / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("emloc", "nf4")
    assert {path.rpartition(".")[2] for path in config["ranks"]} >= {"query_key_value", "dense_h_to_4h"}


def test_an_emulator_says_the_dtype_that_its_base_does_not(tiny_model, rows_file, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    (base / "config.json").write_text(json.dumps(config))
    emulator = compression("trellis", base, rows_file, tmp_path / "emulator").run()  # whose scales are bf16
    assert AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").dtype == torch.float32


def test_plain_transformers_loads_four_bit_weights(tiny_model, rows_file, tmp_path):
    from bitsandbytes.nn import Linear4bit

    emulator = compression("nf4", tiny_model, rows_file, tmp_path / "emulator", {"keep": "head"}).run()
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    replaced = {path for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert replaced == {row["path"] for row in read_manifest(emulator)["result"]["linears"]}
    assert model.is_loaded_in_4bit


@pytest.mark.parametrize("keep", ["head", None], ids=["by bitsandbytes", "by us"])
def test_a_base_in_fp16_is_planned_and_tuned_under_autocast_to_bfloat16(keep, tiny_model, rows_file, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    planned = MemoryModel(base / "config.json", Workload(1, 16), CompressSettings(kind="nf4", keep=keep))
    assert planned.tuning(planned.plan()).terms["activations"]
    emulator = compression("nf4", base, rows_file, tmp_path / "emulator", {"keep": keep}).run()
    adapter = train_job(emulator, rows_file, tmp_path / "adapter", TrainSettings(steps=1, bf16=True)).run()
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(adapter / WEIGHTS).values())


@pytest.mark.parametrize(
    ("family", "kind"),
    most_thorough(
        product(["llama", "internvl"], ["nf4", "low-rank-nf4", "trellis"]),
        ("internvl", "low-rank-nf4"),
    ),
)
def test_the_conformance_kit_holds_for_every_kind(family, kind, tmp_path):
    declared = next(declaration for declaration in plugin_manager().families() if declaration.name == family)
    subject = TinyModel(declared, declared.tiny_configs[0], family, tmp_path, kind)
    for check in (trains, adapter_keys, correction, merge, ties):
        result = check.on(subject)
        assert result.passed, result


@ONE_KIND
def test_training_is_resumed(trained, rows_file, monkeypatch):
    _, emulator, adapter = trained
    train = TrainSettings(steps=8, batch_size=4, learning_rate=1e-2, save_steps=4, logging_steps=4)
    job = train_job(emulator, rows_file, adapter.parent / "resumed", train)
    step = LoraTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    monkeypatch.undo()
    assert (job.run() / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", most_thorough(KINDS, "low-rank-2-bit"))
def test_memory_is_planned_by_what_the_kind_needs(kind, shallow_model):
    workload = Workload(batch_size=2, length=32)
    planned = MemoryModel(shallow_model / "config.json", workload, CompressSettings(kind=kind))
    plan = planned.plan(0.6)
    need = planned.tuning(plan)
    assert need.terms["weights"] == pytest.approx(planned.emulator_bytes(plan), abs=40_000)
    assert need.terms["weights"] < planned.tuning().terms["weights"]


def test_a_kind_comes_from_a_plugin(tiny_model, rows_file, tmp_path):
    class Mine(LowRank):
        name = "mine"

    class Plugin:
        @hookimpl
        def emloc_emulators(self):
            return {"mine": Mine}

    plugin = Plugin()
    plugin_manager().register(plugin, "of_a_test")
    try:
        chosen = CompressSettings(kind="mine", samples=4, selection=2)
        job = compress_job(tiny_model, rows_file, tmp_path / "emulator", chosen)
        assert isinstance(job.format, Mine)
        assert read_manifest(job.run())["request"]["settings"]["kind"] == "mine"
    finally:
        plugin_manager().unregister(plugin)


@pytest.mark.thorough
def test_commands_take_a_kind(emloc, tiny_model, rows_file, tmp_path):
    sized = {}
    for kind in ("low-rank", "nf4", "low-rank-nf4"):
        code, out, err = emloc("plan", tiny_model, "--kind", kind, "--memory", "4GB", "--json")
        assert code == 0, err
        planned = json.loads(out)
        assert planned["kind"] == kind
        sized[kind] = planned["weight_bytes"]["emulator"]
        arguments = ["--data", rows_file, "--samples", 4, "--selection", 2, "--kind", kind, "-o", tmp_path / kind]
        code, out, err = emloc("compress", tiny_model, *arguments, "--json")
        assert code == 0, err
    assert sized["nf4"] < sized["low-rank"]
    code, _, err = emloc("compress", tiny_model, *arguments[:-4], "--kind", "nf4", "--ratio", 0.3, "-o", tmp_path / "x")
    assert code == 1
    assert "no ratio" in err


@pytest.mark.parametrize(
    ("kind", "description"),
    [
        ("low-rank", "rank 6"),
        ("nf4", "four bits"),
        ("low-rank-nf4", "rank 6 in four bits"),
        ("low-rank-2-bit", "rank 6 in two bits"),
        ("trellis", "a trellis code of 2.7 bits"),
    ],
)
def test_a_dry_run_says_what_becomes_of_weights(kind, description, tiny_model, rows_file, tmp_path, emloc):
    sized = [f"--ratio={value}" for value in SETTINGS[kind].values()] if kind != "low-rank" else []
    code, out, _ = emloc(
        "compress", tiny_model, "--data", rows_file, "--samples", 4, "--selection", 2, "--kind", kind, *sized,
        "-o", tmp_path / "emulator", "--dry-run",
    )  # fmt: skip
    line = next(line for line in out.splitlines() if "k_proj" in line)
    assert (code, line.partition(" -> ")[2]) == (0, description)


def test_a_full_disk_at_the_end_does_not_cost_the_first_pass(tiny_model, rows_file, tmp_path, monkeypatch):
    settings = CompressSettings(kind="low-rank-nf4", samples=8, selection=4)
    rows = load_rows(str(rows_file))

    def full(*_args):
        raise DiskFullError("The disk is full.", "Free some space.")

    passes = []
    decompose = Decomposition.run
    monkeypatch.setattr(Decomposition, "run", lambda *args: (passes.append(1), decompose(*args))[1])
    with monkeypatch.context() as patch:
        patch.setattr(EmulatorFiles, "finish", full)
        with pytest.raises(DiskFullError):
            compress_job(tiny_model, rows, tmp_path / "made", settings).run()
    emulator = compress_job(tiny_model, rows, tmp_path / "made", settings).run()
    assert len(passes) == 1
    assert not (emulator / ".spectra").exists()
