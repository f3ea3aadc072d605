"""Spectra: one decomposition, cut at any ratio into the emulator that compress would make."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from emloc_internvl import INTERNVL
from safetensors.torch import load_file, save_file
from support.adapters import contents, make_adapter
from support.models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.correct import Correct
from emloc_core.algorithms.allocation import largest_rank, uniform
from emloc_core.cli import cli
from emloc_core.data.rows import CALIBRATION, SELECTION, load_rows
from emloc_core.emulator.compress import Compress
from emloc_core.emulator.cut import Cut
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.emulator.sensitivity import PROBES
from emloc_core.emulator.spectra import Spectra
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.inputs import Inputs, hash_files
from emloc_core.files.output import read_manifest
from emloc_core.kinds import LowRank
from emloc_core.layers import LowRankLinear
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import make_request
from emloc_core.settings import CompressSettings, CorrectSettings, CutSettings
from emloc_core.units import human_seconds

SETTINGS = CompressSettings(samples=12, selection=6, ratio=0.6, calibration="base", allocator="uniform")
SHARD = "spectra-00002-of-00003.safetensors"


def compression(model, rows_file, output, spectra=None, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return Compress(Checkpoint(model), load_rows(str(rows_file)), output, settings, spectra)


def cut(spectra, model, output, **settings):
    return Cut(Spectra(spectra), Checkpoint(model), output, CutSettings(**{"allocator": "uniform", **settings}))


@pytest.fixture(scope="module")
def kept(tiny_model, rows_file, tmp_path_factory):
    """The emulator at 0.6 and the spectra that were kept beside it."""
    directory = tmp_path_factory.mktemp("kept")
    compression(tiny_model, rows_file, directory / "emulator", directory / "spectra").run()
    return directory / "emulator", directory / "spectra"


@pytest.fixture(scope="module")
def whole(tiny_model, rows_file, tmp_path_factory):
    """A function that makes an emulator without a stop, once for the same changes of the settings."""
    made = {}

    def make(**changes):
        key = frozenset(changes.items())
        if key not in made:
            output = tmp_path_factory.mktemp("whole") / "emulator"
            made[key] = compression(tiny_model, rows_file, output, **changes).run()
        return made[key]

    return make


@pytest.fixture
def copy(kept, tmp_path):
    """A copy of the spectra, to be damaged."""
    return shutil.copytree(kept[1], tmp_path / "copy")


def products(emulator):
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    return {path: (layer.rank, (layer.weight @ layer.V).detach()) for path, layer in layers.items()}


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.95])
def test_a_cut_is_the_emulator_that_compress_makes(tiny_model, kept, whole, tmp_path, ratio):
    made = whole(ratio=ratio)
    sliced = cut(kept[1], tiny_model, tmp_path / "sliced", ratio=ratio).run()
    expected, found = products(made), products(sliced)
    assert expected.keys() == found.keys()
    for path, (rank, product) in expected.items():
        assert found[path][0] == rank
        assert (found[path][1] - product).norm() / product.norm() < 1e-5, path  # both sides: gate and up widen
    for path in made.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("emloc.json", "timing.json"):
            assert path.read_bytes() == (sliced / path.name).read_bytes(), path.name
    rest = "model-00004-of-00004.safetensors"
    assert (made / rest).read_bytes() == (sliced / rest).read_bytes()
    one, other = read_manifest(made), read_manifest(sliced)
    for first, second in zip(one["result"].pop("linears"), other["result"].pop("linears"), strict=True):
        assert second.pop("relative_error") == pytest.approx(first.pop("relative_error"), rel=1e-4)  # fp32
        assert first == second
    del one["result"]["sha256"], other["result"]["sha256"]  # the factors are equal up to rounding
    assert one["result"] == other["result"]
    fingerprint = other["request"].pop("spectra")
    assert (one["kind"], one["request"]) == (other["kind"], other["request"])
    assert fingerprint == Spectra(kept[1]).fingerprint(Inputs())


def test_the_emulator_beside_kept_spectra_is_cut_from_them(tiny_model, kept, tmp_path):
    emulator, spectra = kept
    assert contents(cut(spectra, tiny_model, tmp_path / "cut", ratio=0.6).run()) == contents(emulator)


def test_spectra_hold_the_largest_useful_factors_and_all_energies(kept):
    ranks = read_manifest(kept[1])["result"]["linears"]
    assert len(ranks) == 21
    for path, rank in ranks.items():
        block = int(path.split(".")[2])
        tensors = load_file(kept[1] / f"spectra-{block + 1:05d}-of-00003.safetensors")
        u, v, energies = (tensors[f"{path}.{part}"] for part in ("U", "V", "energies"))
        (m, k), n = u.shape, v.shape[1]
        assert k == v.shape[0] == rank == largest_rank(m, n)
        assert (energies.dtype, len(energies)) == (torch.float64, min(m, n))
        assert bool((energies.diff() <= 0).all())


def test_sensitivities_are_those_of_the_whole_model(tiny_model, rows_file, kept):
    samples = compression(tiny_model, rows_file, kept[0]).samples[:PROBES]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval()
    block, tensors = model.model.layers[1], load_file(kept[1] / SHARD)

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
            u, v, energies, sensitivity = (tensors[f"{path}.{p}"] for p in ("U", "V", "energies", "sensitivity"))
            rank, weight = uniform([tuple(linear.weight.shape)], 0.5)[0], linear.weight.clone()
            linear.weight.copy_(u[:, :rank] @ v[:rank])
            change = ((behind() - before).norm(dim=1) / before.norm(dim=1)).square().mean()
            linear.weight.copy_(weight)
            error = float(energies[rank:].sum() / energies.sum())
            assert float(sensitivity) == pytest.approx(float(change) / error, rel=1e-3), path


def test_a_lora_tuned_on_a_cut_emulator_is_carried_over(tiny_model, kept, tmp_path):
    emulator = cut(kept[1], tiny_model, tmp_path / "emulator", ratio=0.3).run()
    adapter = make_adapter(emulator, tmp_path / "adapter")
    job = Correct(Adapter(adapter), Checkpoint(tiny_model), tmp_path / "corrected", CorrectSettings(clamp=1.0))
    assert read_manifest(job.run())["result"]["linears"] == 21


@pytest.fixture
def counted(monkeypatch):
    """How many Linears were factorised."""
    calls, inner = [], LowRank.factorize

    def factorize(*args):
        calls.append(1)
        return inner(*args)

    monkeypatch.setattr(LowRank, "factorize", staticmethod(factorize))
    return calls


def test_the_time_of_the_spectra_is_shown_beside_that_of_the_cut(tiny_model, rows_file, copy, tmp_path):
    (copy / "timing.json").write_text('{"seconds": 5025, "peak_rss_bytes": 7000000}')
    argv = ("compress", tiny_model, "--data", rows_file, "--samples", 12, "--selection", 6, "--keep-spectra", copy)
    result = CliRunner().invoke(cli, [*map(str, argv), "-o", str(tmp_path / "small")], catch_exceptions=False)
    assert f"spectra for cutting other ratios: {copy}  ({human_seconds(5025)}, peak memory 7 MB)" in result.stdout


def test_kept_spectra_serve_the_next_ratio_without_factorising(tiny_model, rows_file, copy, tmp_path, counted):
    compression(tiny_model, rows_file, tmp_path / "small", copy, ratio=0.3).run()
    assert not counted


class Stop(BaseException):
    """The process ends, as by a signal."""


def stopping_after(step):
    calls = iter(range(1, 100))

    def progress(*_):
        if next(calls) == step:
            raise Stop

    return progress


@pytest.mark.parametrize("step", range(1, 7))
def test_global_goes_on_after_a_stop_with_the_same_bytes(tiny_model, rows_file, whole, tmp_path, counted, step):
    expected = whole(allocator="global")
    counted.clear()
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run(stopping_after(step))
    assert not (tmp_path / "again").exists()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(expected)
    assert len(counted) == 21  # three blocks of seven Linears: none of them twice
    assert sorted(path.name for path in tmp_path.iterdir()) == [".emloc-hashes.json", "again"]


def test_global_stopped_just_before_it_is_published(tiny_model, rows_file, whole, tmp_path, monkeypatch):
    def stop(*_):
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(EmulatorFiles, "finish", stop)
        with pytest.raises(Stop):
            compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(whole(allocator="global"))


@pytest.mark.parametrize("step", range(1, 7))
def test_spectra_and_cut_go_on_after_a_stop_with_the_same_bytes(tiny_model, rows_file, kept, tmp_path, counted, step):
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "emulator", tmp_path / "spectra").run(stopping_after(step))
    compression(tiny_model, rows_file, tmp_path / "emulator", tmp_path / "spectra").run()
    assert contents(tmp_path / "spectra") == contents(kept[1])
    assert contents(tmp_path / "emulator") == contents(kept[0])
    assert len(counted) == 21


def cut_short(content):
    return content[: len(content) // 2]


def overwritten(content):
    return content[:-200] + b"\xff" * 100 + content[-100:]


@pytest.mark.parametrize("damage", [cut_short, overwritten])
@pytest.mark.parametrize(
    ("changes", "step", "damaged"),
    [
        ({}, 2, ("model-00001-of-00004.safetensors", 14)),
        ({"calibration": "propagated"}, 2, ("model-00001-of-00004.safetensors", 14)),
        ({"allocator": "global"}, 2, ("..spectra.partial/content/spectra-00001-of-00003.safetensors", 14)),
        ({"allocator": "global"}, 5, (".spectra/spectra-00001-of-00003.safetensors", 21)),
        ({"allocator": "global"}, 5, ("model-00001-of-00004.safetensors", 0)),
    ],
)
def test_a_shard_that_was_damaged_meanwhile_is_made_again(
    tiny_model, rows_file, whole, tmp_path, counted, capsys, changes, step, damaged, damage
):
    shard, factorised = damaged  # and how many Linears are factorised again
    expected = whole(**changes)
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
    tiny_model, rows_file, whole, tmp_path, monkeypatch, counted
):
    def synced(path):
        if path.name.startswith("model-"):
            raise Stop

    expected = whole(allocator="global")
    with monkeypatch.context() as patch:
        patch.setattr("emloc_core.files.output._fsync", synced)
        with pytest.raises(Stop):
            compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    counted.clear()
    again = compression(tiny_model, rows_file, tmp_path / "again", allocator="global").run()
    assert contents(again) == contents(expected)
    assert not counted


@pytest.mark.parametrize("damage", [False, True])
def test_a_kill_while_spectra_are_removed(tiny_model, rows_file, whole, tmp_path, monkeypatch, damage):
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
    assert contents(again) == contents(whole(allocator="global"))


def test_global_spends_no_more_than_uniform_and_differs(tiny_model, kept, whole, tmp_path):
    emulator = cut(kept[1], tiny_model, tmp_path / "cut", ratio=0.6, allocator="global").run()
    even, shared = read_manifest(kept[0])["result"], read_manifest(emulator)["result"]
    assert shared["parameters"]["compressed_linears_after"] <= even["parameters"]["compressed_linears_after"]
    ranks = [[linear["rank"] for linear in result["linears"]] for result in (even, shared)]
    assert ranks[0] != ranks[1]
    made = whole(allocator="global")
    for name in (f"model-0000{index}-of-00004.safetensors" for index in range(1, 5)):
        assert (made / name).read_bytes() == (emulator / name).read_bytes()


def test_spectra_are_not_kept_of_propagated_calibration(tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match="depend on the ranks of earlier layers"):
        compression(tiny_model, rows_file, tmp_path / "out", tmp_path / "spectra", calibration="propagated")
    for inside in ("out", "out/spectra"):
        with pytest.raises(EmlocError, match="would be in the emulator's directory"):
            compression(tiny_model, rows_file, tmp_path / "out", tmp_path / inside)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [2, 5])
def test_ranks_by_spectra_serve_propagated_calibration(tiny_model, rows_file, kept, whole, tmp_path, step):
    changes = {"allocator": "global", "calibration": "propagated"}
    emulator = whole(**changes)
    plain = cut(kept[1], tiny_model, tmp_path / "plain", ratio=0.6, allocator="global").run()
    expected, found = products(plain), products(emulator)
    assert {path: rank for path, (rank, _) in found.items()} == {path: rank for path, (rank, _) in expected.items()}
    last = "model.layers.2.mlp.down_proj"
    assert (found[last][1] - expected[last][1]).norm() / expected[last][1].norm() > 1e-2
    with pytest.raises(Stop):
        compression(tiny_model, rows_file, tmp_path / "again", **changes).run(stopping_after(step))
    shard = next(tmp_path.glob(".again.partial/**/spectra-00001-of-00003.safetensors"))
    assert {key.rpartition(".")[2] for key in load_file(shard)} == {"energies", "sensitivity"}  # no factors on disk
    assert contents(compression(tiny_model, rows_file, tmp_path / "again", **changes).run()) == contents(emulator)


@pytest.mark.parametrize("calibration", ["base", "propagated"])
def test_two_passes_are_reported_as_one(tiny_model, rows_file, tmp_path, calibration):
    seen = []
    job = compression(tiny_model, rows_file, tmp_path / "out", allocator="global", calibration=calibration)
    job.run(lambda _block, done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_spectra_of_another_base_are_refused(tiny_model, kept, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match=r"another base than .*other: the fingerprints differ"):
        cut(kept[1], other, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def truncate(spectra):
    (spectra / SHARD).write_bytes((spectra / SHARD).read_bytes()[:-100])


def spoil(part):
    def change(spectra):
        tensors = load_file(spectra / SHARD)
        tensors[f"model.layers.1.mlp.up_proj.{part}"].view(-1)[0] = float("nan")
        save_file(tensors, spectra / SHARD)
        sign(spectra)

    return change


def sign(spectra):
    """Make the manifest say that shards and rows are as they were made."""
    manifest = read_manifest(spectra)
    rows = [spectra / name for name in (CALIBRATION, SELECTION)]
    manifest["result"]["sha256"] = hash_files([*sorted(spectra.glob("*.safetensors")), *rows])
    (spectra / "emloc.json").write_text(json.dumps(manifest))


def flip(spectra):
    content = bytearray((spectra / SHARD).read_bytes())
    content[-9] ^= 1
    (spectra / SHARD).write_bytes(content)


def forget_a_block(spectra):
    manifest = read_manifest(spectra)
    (spectra / SHARD).rename(spectra / SHARD.replace("00002-of-00003", "00001-of-00001"))
    manifest["result"]["blocks"] = manifest["result"]["blocks"][1:2]
    (spectra / "emloc.json").write_text(json.dumps(manifest))


def drop(spectra):
    tensors = load_file(spectra / SHARD)
    del tensors["model.layers.1.mlp.up_proj.V"]
    save_file(tensors, spectra / SHARD)
    sign(spectra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "truncated"),
        (lambda spectra: (spectra / SHARD).unlink(), f"{SHARD} does not exist"),
        (lambda spectra: (spectra / "calibration.jsonl").unlink(), "lacks calibration.jsonl"),
        (lambda spectra: (spectra / "emloc.json").unlink(), "holds no spectra"),
        (lambda spectra: (spectra / "selection.jsonl").unlink(), "lacks selection.jsonl"),
        (flip, "has changed since it was made"),
        (forget_a_block, r"lacks the block model\.layers\.0"),
        (lambda spectra: (spectra / "emloc.json").write_text('{"kind": "spectra"}'), r"has no request\.base"),
        (drop, r"lacks V of model\.layers\.1\.mlp\.up_proj"),
        (spoil("U"), r"spectra of model\.layers\.1\.mlp\.up_proj .* NaN"),
        (spoil("V"), r"spectra of model\.layers\.1\.mlp\.up_proj .* NaN"),
        (spoil("sensitivity"), r"spectra of model\.layers\.1\.mlp\.up_proj .* NaN"),
        (spoil("energies"), r"spectra of model\.layers\.1\.mlp\.up_proj .* NaN"),
    ],
)
@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_damaged_spectra_are_refused_and_leave_nothing(tiny_model, copy, tmp_path, change, message, allocator):
    change(copy)
    with pytest.raises(EmlocError, match=message):
        cut(copy, tiny_model, tmp_path / "out", ratio=0.9, allocator=allocator).run()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".emloc-hashes.json") == ["copy"]


def test_an_emulator_is_no_spectra(tiny_model, kept, tmp_path):
    with pytest.raises(EmlocError, match="holds no spectra"):
        cut(kept[0], tiny_model, tmp_path / "out")


def test_the_command_line(tiny_model, rows_file, tmp_path):
    def emloc(*argv):
        result = CliRunner().invoke(cli, [str(text) for text in argv], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    common = ("compress", tiny_model, "--data", rows_file, "--samples", 12, "--selection", 6, "--json")
    argv = (*common, "-o", tmp_path / "emulator", "--keep-spectra", tmp_path / "spectra")
    assert emloc(*argv, "--dry-run")["finished"] is False
    assert not (tmp_path / "spectra").exists()
    assert emloc(*argv)["kind"] == "emulator"
    assert emloc(*argv, "--dry-run")["finished"] is True
    argv = ("cut", tmp_path / "spectra", "--base", tiny_model, "-o", tmp_path / "small", "--ratio", 0.3, "--json")
    dry = emloc(*argv, "--dry-run")
    assert not (tmp_path / "small").exists()
    made = emloc(*argv)
    assert made["request"]["settings"]["ratio"] == 0.3
    assert abs(dry["emulator_bytes"] - made["result"]["bytes"]["emulator"]) < 1
    ranks = {linear["path"]: linear["rank"] for linear in dry["linears"]}
    assert ranks == {linear["path"]: linear["rank"] for linear in made["result"]["linears"]}


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "nan"])
def test_ratio_out_of_range(ratio):
    with pytest.raises(EmlocError, match="ratio"):
        make_request("cut", {"ratio": ratio}, spectra="spectra", output="emulator")


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
    [{}, {"allocator": "global"}, {"calibration": "propagated"}, {"allocator": "global", "calibration": "propagated"}],
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


def test_the_same_is_cut_from_spectra(pictures, rows_file, tmp_path):
    compression(pictures, rows_file, tmp_path / "emulator", tmp_path / "spectra").run()
    emulator = cut(tmp_path / "spectra", pictures, tmp_path / "cut", ratio=0.3).run()
    linears = read_manifest(emulator)["result"]["linears"]
    assert all((linear["rank"] is None) == ("vision" in linear["path"]) for linear in linears)


@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_rows_that_reach_nothing_are_an_error(pictures, rows_file, tmp_path, monkeypatch, allocator):
    family = replace(
        plugin_manager().family_for(Checkpoint(pictures).config), keep_dense={"*language_model*": "for this test"}
    )
    monkeypatch.setattr(plugin_manager(), "family_for", lambda _: family)
    with pytest.raises(EmlocError, match="No calibration row passes through any Linear"):
        compression(pictures, rows_file, tmp_path / "emulator", allocator=allocator).run()
    assert [path.name for path in tmp_path.iterdir()] == [".emloc-hashes.json"]
