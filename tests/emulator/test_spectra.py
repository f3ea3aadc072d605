"""Spectra, by which ranks are shared out: what they hold, and what a stop between the two passes leaves."""

import shutil
from dataclasses import replace

import pytest
import torch
from emloc_internvl import INTERNVL
from safetensors.torch import load_file
from support.adapters import contents
from support.jobs import compress_job
from support.marks import most_thorough, thorough
from support.models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from emloc_core.algorithms.factorize import Factors
from emloc_core.emulator.decompose import Decomposition
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.emulator.ranks import allocated
from emloc_core.emulator.sensitivity import PROBES, RATIO
from emloc_core.emulator.spectra import Spectra
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings
from emloc_core.standins import LowRank
from emloc_core.standins.low_rank import LowRankLinear

SETTINGS = CompressSettings(samples=12, selection=6, ratio=0.6, calibration="base", allocator="uniform")
SHARD = "spectra-00002-of-00003.safetensors"


def compression(model, rows_file, output, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return compress_job(model, rows_file, output, settings)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, rows_file, tmp_path_factory):
    """A function that makes an emulator without a stop, once for the same changes of the settings."""
    emulators = {}

    def make(**changes):
        key = frozenset(changes.items())
        if key not in emulators:
            output = tmp_path_factory.mktemp("whole") / "emulator"
            emulators[key] = compression(tiny_model, rows_file, output, **changes).run()
        return emulators[key]

    return make


def products(emulator):
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    return {path: (layer.rank, (layer.weight @ layer.V).detach()) for path, layer in layers.items()}


def test_a_spectrum_has_all_energies_and_the_sensitivity_of_the_whole_model(tiny_model, rows_file, tmp_path):
    job = compression(tiny_model, rows_file, tmp_path / "emulator")
    plan = allocated(job.method.linears, RATIO)
    spectra, factors_of = Spectra(job.base.skeleton.blocks, tmp_path / "spectra"), {}

    class Both:
        is_written = spectra.is_written

        def write(self, block, fitted):
            factors_of.update({path: factors for path, (factors, _) in fitted.items()})
            spectra.write(block, fitted)

    Decomposition(job.base.skeleton, plan, job.samples, LowRank(), lambda *_: None).run(Both(), PROBES)
    assert spectra.are_complete
    samples = job.samples[:PROBES]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    block, linears = model.model.layers[1], {linear.path: linear for linear in plan.linears}

    def behind():
        """Hidden states behind the block, of all tokens: the blocks before it are as in the base."""
        states = []
        handle = block.register_forward_hook(lambda *call: states.append(call[-1][0].reshape(-1, 32)))
        for sample in samples:
            model(**sample.inputs("cpu"))
        handle.remove()
        return torch.cat(states)

    with torch.no_grad():
        before = behind()
        for name in ("self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            path, linear = f"model.layers.1.{name}", block.get_submodule(name)
            spectrum, weight = spectra.spectrum(linears[path]), linear.weight.clone()
            assert (spectrum.energies.dtype, len(spectrum.energies)) == (torch.float64, min(weight.shape))
            assert bool((spectrum.energies.diff() <= 0).all())
            linear.weight.copy_(factors_of[path].u @ factors_of[path].v)
            change = ((behind() - before).norm(dim=1) / before.norm(dim=1)).square().mean()
            linear.weight.copy_(weight)
            error = float(spectrum.energies[linears[path].rank :].sum() / spectrum.energies.sum())
            assert spectrum.sensitivity == pytest.approx(float(change) / error, rel=1e-3), path


@pytest.fixture
def counted(monkeypatch):
    """How many Linears were factorised."""
    calls, inner = [], LowRank.factorize

    def factorize(*args):
        calls.append(1)
        return inner(*args)

    monkeypatch.setattr(LowRank, "factorize", staticmethod(factorize))
    return calls


def test_a_sensitivity_that_is_nan_is_refused(tmp_path):
    factors = Factors(torch.ones(4, 2), torch.ones(2, 4), torch.ones(4))
    with pytest.raises(EmlocError, match=r"With block\.linear changed, the outputs of block are NaN or Inf"):
        Spectra(["block"], tmp_path / "spectra").write("block", {"block.linear": (factors, torch.nan)})


class Stop(BaseException):
    """The process ends, as by a signal."""


def stopping_after(step):
    calls = iter(range(1, 100))

    def progress(*_):
        if next(calls) == step:
            raise Stop

    return progress


@pytest.mark.parametrize("step", most_thorough(range(1, 7), 2, 5))
def test_global_goes_on_after_a_stop_with_the_same_bytes(tiny_model, rows_file, uninterrupted, tmp_path, counted, step):
    expected = uninterrupted(allocator="global")
    counted.clear()
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run(stopping_after(step))
    assert not (tmp_path / "again").exists()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(expected)
    assert len(counted) == 42  # three blocks of seven Linears: none of them twice in a pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".emloc-hashes.json", "again"]


def test_global_stopped_just_before_it_is_published(tiny_model, rows_file, uninterrupted, tmp_path, monkeypatch):
    def stop(*_):
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(EmulatorFiles, "finish", stop)
        with pytest.raises(Stop):
            compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(uninterrupted(allocator="global"))


def cut_short(content):
    return content[: len(content) // 2]


def overwritten(content):
    return content[:-200] + b"\xff" * 100 + content[-100:]


@pytest.mark.parametrize("damage", [cut_short, *thorough(overwritten)])
@pytest.mark.parametrize(
    ("changes", "step", "damaged"),
    [
        ({}, 2, ("model-00001-of-00004.safetensors", 14)),
        *thorough(({"calibration": "propagated"}, 2, ("model-00001-of-00004.safetensors", 14))),
        ({"allocator": "global"}, 2, (".spectra/spectra-00001-of-00003.safetensors", 35)),
        ({"allocator": "global"}, 5, (".spectra/spectra-00001-of-00003.safetensors", 14)),
        *thorough(({"allocator": "global"}, 5, ("model-00001-of-00004.safetensors", 14))),
    ],
)
def test_a_shard_that_was_damaged_meanwhile_is_made_again(
    tiny_model, rows_file, uninterrupted, tmp_path, counted, capsys, changes, step, damaged, damage
):
    shard, factorised = damaged  # and how many Linears are factorised again
    expected = uninterrupted(**changes)
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "again", **changes).run(stopping_after(step))
    path = tmp_path / ".again.partial" / "content" / shard
    path.write_bytes(damage(path.read_bytes()))
    counted.clear()
    again = compression(tiny_model, rows_file, tmp_path / "again", **changes).run()
    assert capsys.readouterr().err == f"emloc: {path} is damaged and will be made again.\n"
    assert contents(again) == contents(expected)
    assert len(counted) == factorised


def test_a_kill_while_an_emulator_is_published_repeats_nothing(
    tiny_model, rows_file, uninterrupted, tmp_path, monkeypatch, counted
):
    def synced(path):
        if path.name.startswith("model-"):
            raise Stop

    expected = uninterrupted(allocator="global")
    with monkeypatch.context() as patch:
        patch.setattr("emloc_core.files.output._fsync", synced)
        with pytest.raises(Stop):
            compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    counted.clear()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(expected)
    assert not counted


@pytest.mark.parametrize("damage", [*thorough(False), True])
def test_a_kill_while_spectra_are_removed(tiny_model, rows_file, uninterrupted, tmp_path, monkeypatch, damage):
    def remove(directory, *_, **__):
        if "spectra" in directory.name:
            next(directory.glob("spectra-*")).unlink()
            raise Stop
        whole_removal(directory)

    whole_removal, content = shutil.rmtree, tmp_path / ".again.partial" / "content"
    if damage:  # then they are removed to be made again
        with pytest.raises(Stop):
            compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run(stopping_after(5))
        (content / ".spectra" / SHARD).write_bytes(b"damaged")
    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    monkeypatch.undo()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(uninterrupted(allocator="global"))


def test_global_spends_no_more_than_uniform_and_differs(uninterrupted):
    even, shared = (read_manifest(uninterrupted(allocator=name))["result"] for name in ("uniform", "global"))
    assert shared["parameters"]["compressed_linears_after"] <= even["parameters"]["compressed_linears_after"]
    ranks = [[linear["rank"] for linear in result["linears"]] for result in (even, shared)]
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("step", most_thorough([2, 5], 2))
def test_ranks_by_spectra_serve_propagated_calibration(tiny_model, rows_file, uninterrupted, tmp_path, step):
    changes = {"allocator": "global", "calibration": "propagated"}
    emulator = uninterrupted(**changes)
    expected, actual = products(uninterrupted(allocator="global")), products(emulator)
    assert {path: rank for path, (rank, _) in actual.items()} == {path: rank for path, (rank, _) in expected.items()}
    last = "model.layers.2.mlp.down_proj"
    assert (actual[last][1] - expected[last][1]).norm() / expected[last][1].norm() > 1e-2
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "again", **changes).run(stopping_after(step))
    shard = next(tmp_path.glob(".again.partial/**/spectra-00001-of-00003.safetensors"))
    assert {key.rpartition(".")[2] for key in load_file(shard)} == {"energies", "sensitivity"}  # no factors on disk
    assert contents(compression(tiny_model, rows_file, tmp_path / "again", **changes).run()) == contents(emulator)


@pytest.mark.parametrize("calibration", most_thorough(["base", "propagated"], "propagated"))
def test_two_passes_are_reported_as_one(tiny_model, rows_file, tmp_path, calibration):
    seen = []
    job = compression(tiny_model, rows_file, tmp_path / "out", allocator="global", calibration=calibration)
    job.run(lambda _block, done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tiny model with a tower for pictures, which rows of text never pass through."""
    settings = dict(INTERNVL.tiny_configs[0])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    directory = tmp_path_factory.mktemp("models") / "internvl"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"allocator": "global", "calibration": "propagated"},
        *thorough({"allocator": "global"}, {"calibration": "propagated"}),
    ],
)
def test_a_tower_that_no_row_passes_through_stays_dense(pictures, rows_file, tmp_path, changes):
    emulator = compression(pictures, rows_file, tmp_path / "emulator", **changes).run()
    linears = read_manifest(emulator)["result"]["linears"]
    towers = {tower: [linear for linear in linears if tower in linear["path"]] for tower in ("vision", "language")}
    assert {linear["reason"] for linear in towers["vision"]} == {"no calibration row passes through it"}
    assert all(linear["rank"] for linear in towers["language"])
    base, small = Checkpoint(pictures), Checkpoint(emulator)
    kept = [key for key in base.tensors if "vision" in key]
    with base.slices(kept) as originals, small.slices(kept) as copies:
        assert all(torch.equal(originals[key][...], copies[key][...]) for key in kept)
    model = AutoModelForImageTextToText.from_pretrained(emulator, dtype="auto")
    assert sum(isinstance(layer, LowRankLinear) for layer in model.modules()) == len(towers["language"])


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_rows_that_reach_nothing_are_an_error(pictures, rows_file, tmp_path, monkeypatch, allocator):
    family = replace(
        plugin_manager().family_for(Checkpoint(pictures).config), keep_dense={"*language_model*": "for this test"}
    )
    monkeypatch.setattr(plugin_manager(), "family_for", lambda _: family)
    with pytest.raises(EmlocError, match="No calibration row passes through any Linear"):
        compression(pictures, rows_file, tmp_path / "emulator", allocator=allocator).run()
    assert [path.name for path in tmp_path.iterdir()] == [".emloc-hashes.json"]
