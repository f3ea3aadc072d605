"""The doctor: what it says of versions, GPUs and plugins, and that nothing broken breaks it."""

import json
import subprocess
import sys

import pytest

from emloc_core import doctor
from emloc_core.compat.tested import TESTED
from emloc_core.doctor import Check


def test_it_imports_the_standard_library_alone():
    script = "import sys, emloc_core.doctor; print({'click', 'pydantic', 'pluggy', 'torch'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


def test_what_raises_and_what_ends_the_process_is_named_and_the_rest_is_still_tried(tmp_path, monkeypatch):
    (tmp_path / "broken_by_error.py").write_text("print('hello')\nraise ImportError('no symbol\\nmore')")
    (tmp_path / "broken_by_abort.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errors = doctor.probe(["json", "broken_by_error", "broken_by_abort", "nowhere_at_all", "math"])
    assert errors["json"] is None
    assert errors["broken_by_error"] == "ImportError: no symbol"
    assert "ended with code -6" in errors["broken_by_abort"]
    assert "No module named" in errors["nowhere_at_all"]
    assert errors["math"] is None


@pytest.mark.parametrize(
    ("installed", "error", "state", "text"),
    [
        ("5.24.1", None, "ok", "tested up to 5.24"),
        ("5.30.0", None, "warning", "newer than what was tested"),
        ("5.3.0+cpu", None, "error", "too old"),
        ("5.24.0", "ImportError: no", "error", "cannot be imported: ImportError: no"),
        (None, None, "error", "missing"),
    ],
)
def test_a_package_is_judged_by_its_version_and_its_import(monkeypatch, installed, error, state, text):
    monkeypatch.setattr(
        doctor, "requires", lambda _: ["transformers<5.25,>=5.20", "transformers>=5.24; extra == 'dev'"]
    )
    monkeypatch.setattr(doctor, "_installed", lambda _: installed)
    monkeypatch.setitem(TESTED, "transformers", ("5.24", "a part"))
    monkeypatch.setattr(doctor, "probe", lambda _: {"transformers": error, "gpus": {}, "plugins": []})
    (package,) = (check for check in doctor.examine() if check.name == "transformers")
    assert (package.state, text in package.text) == (state, True), package
    assert doctor.is_healthy([package]) == (state != "error")


def test_a_package_of_an_extra_may_be_missing(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["gguf>=0.17; extra == 'gguf'", 'mypy>=1.0; extra == "dev"'])
    monkeypatch.setattr(doctor, "_installed", lambda _: None)
    monkeypatch.setattr(doctor, "probe", lambda _: {"gpus": {}, "plugins": []})
    packages = [check for check in doctor.examine() if check.group == "packages"][1:]
    assert packages == [Check("packages", "gguf", "note", "not installed (to install it: pip install 'emloc[gguf]')")]


DEVICE = {"name": "A", "free": 70e9, "total": 80e9}


@pytest.mark.parametrize(
    ("gpus", "driver", "state", "text"),
    [
        ({"cuda": None, "devices": []}, None, "note", "no GPU"),
        ({"cuda": None, "devices": []}, "570.1", "warning", "torch was built for CPUs"),
        ({"cuda": "12.8", "devices": []}, "470.1", "warning", "torch was built for CUDA 12.8"),
        (
            {"cuda": "12.8", "devices": [DEVICE], "compiles": True},
            "570.1",
            "ok",
            "70 GB of 80 GB",
        ),
        ({"cuda": "12.8", "devices": [DEVICE], "compiles": False}, "570.1", "warning", "install gcc"),
        ({"cuda": None, "devices": [], "compiles": False}, None, "warning", "install gcc"),
        ("ImportError: torch", None, "error", "ImportError: torch"),
    ],
)
def test_a_gpu_is_told_with_its_driver_or_why_it_is_not_used(monkeypatch, gpus, driver, state, text):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(doctor, "probe", lambda _: {"gpus": gpus, "plugins": "TypeError: bad"})
    checks = {check.group: check for check in doctor.examine()}
    assert (checks["gpu"].state, text in checks["gpu"].text) == (state, True), checks["gpu"]
    assert checks["plugins"].state == "error"


@pytest.mark.parametrize(
    ("slow", "state", "text"),
    [
        ([], "ok", "multiplies float32 and bfloat16 and float16 fast"),
        (["float16"], "ok", "multiplies float32 and bfloat16 fast; products in float16 are computed in single"),
        (["bfloat16", "float16"], "note", "multiplies float32 fast; products in bfloat16 and float16 are"),
        ("ImportError: torch", "error", "ImportError: torch"),
    ],
)
def test_what_the_processor_multiplies_fast_is_told(monkeypatch, slow, state, text):
    monkeypatch.setattr(doctor, "probe", lambda _: {"products": slow, "gpus": {}, "plugins": []})
    (processor,) = (check for check in doctor.examine() if check.name == "processor")
    assert (processor.state, text in processor.text) == (state, True), processor


def test_a_full_disk_and_a_cache_that_cannot_be_written_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nowhere" / "yet"))
    monkeypatch.setattr(doctor.os, "access", lambda path, _: path != tmp_path)
    monkeypatch.setattr(doctor, "probe", lambda _: {"gpus": {}, "plugins": []})
    monkeypatch.setattr(doctor, "_LITTLE", 1 << 62)
    checks = {check.name: check for check in doctor.examine() if check.group == "room"}
    assert checks["disk here"].state == "warning"
    assert checks["models' cache"].state == "error"


def test_this_installation_is_healthy_and_so_says_the_command(emloc, monkeypatch):
    monkeypatch.setattr(doctor, "_LITTLE", 0)  # whatever room this machine's disk has
    code, out, _ = emloc("doctor", "--json")
    report = json.loads(out)
    assert (code, report["healthy"]) == (0, True), out
    names = {check["name"]: check["state"] for check in report["checks"]}
    assert {names[name] for name in ("torch", "transformers", "llama", "memory", "models' cache")} == {"ok"}
