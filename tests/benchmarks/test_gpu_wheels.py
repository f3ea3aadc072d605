"""What ``benchmarks/gpu_wheels.py`` packs for a machine without a registry."""

import zipfile

import pytest
from gpu_wheels import PREINSTALLED, requirements, with_one_library

NAMES = ["cpu", "cuda128", "cuda130"]


def test_what_is_needed_is_packed_in_the_versions_of_here_but_for_what_is_there():
    names = [requirement.partition("==")[0] for requirement in requirements("3.12", [*PREINSTALLED, "peft"])]
    assert {"transformers", "bitsandbytes", "huggingface-hub", "pytest"} <= set(names)
    assert not {"emloc", "torch", "numpy", "peft"} & set(names)
    assert len(names) == len(set(names))


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in NAMES]
        record = "".join(f"{name},sha256=,1\n" for name in ["bitsandbytes/__init__.py", *libraries])
        for name in ["bitsandbytes/__init__.py", *libraries]:
            archive.writestr(name, name)
        archive.writestr("bitsandbytes-1.dist-info/RECORD", record)
    return path


def test_one_library_for_a_gpu_stays(wheel):
    with_one_library(wheel, "_cuda130.so")
    with zipfile.ZipFile(wheel) as archive:
        names, record = archive.namelist(), archive.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert [name for name in NAMES if any(name in path for path in names)] == ["cpu", "cuda130"]
    assert [name for name in ("__init__", *NAMES) if name in record] == ["__init__", "cpu", "cuda130"]


def test_a_library_that_is_not_there_is_named(wheel):
    with pytest.raises(SystemExit, match="no library _cuda999"):
        with_one_library(wheel, "_cuda999.so")
