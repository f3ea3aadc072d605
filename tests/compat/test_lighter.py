"""What imports put off is done when it is needed, with the same result."""

import json
import subprocess
import sys

import pytest
from support.contracts import contract

from emloc_core.compat.lighter import _compiled_when_called

SCRIPT = """
import importlib.metadata, json, sys, torch
read = []
sys.addaudithook(lambda event, given: event == "open" and read.append(given[0]))
import bitsandbytes, numpy
import emloc_core.standins.nf4
compiler = "torch._dynamo" in sys.modules
from trl.import_utils import PACKAGE_DISTRIBUTION_MAPPING as packages
from transformers import PreTrainedModel
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from trl.trainer.utils import IterableDataset
names = ("torch._inductor.compile_fx", "scipy.optimize", "pandas", "datasets")
found = {"torch._dynamo": compiler, **{name: name in sys.modules for name in names}}
print(json.dumps({
    "imported": [name for name, is_there in found.items() if is_there],
    "read": sum(str(name).endswith("modeling_llama.py") for name in read),
    "put off": type(packages).__name__,
    "packages": [packages["bitsandbytes"], importlib.metadata.packages_distributions()["bitsandbytes"]],
    "stands in": isinstance(IterableDataset.from_generator(list), IterableDataset),
    "pairs": [part.tolist() for part in linear_sum_assignment(numpy.eye(2))],
}))
"""


@pytest.mark.thorough
@contract("trl", "compat.lighter")
def test_imports_put_off_what_few_programs_need():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["imported"], f"{report['imported']} are imported all the same"
    assert report["read"] == 1, f"transformers reads a model's file {report['read']} times to find the names in it"
    assert "gemm_4bit_forward" not in done.stderr, f"bitsandbytes tells of its kernels in another way: {done.stderr}"
    assert report["put off"] == "_Packages", "trl reads all packages in another way"
    assert report["packages"][0] == report["packages"][1], f"packages differ: {report['packages']}"
    assert report["stands in"], "what stands in for a class knows no instance of it"
    assert report["pairs"] == [[0, 1], [1, 0]], f"scipy matches {report['pairs']}"


def test_functions_are_compiled_once_when_they_are_called():
    calls = []

    def compiler(function, **options):
        calls.append(options)
        return lambda *args: function(*args) + 1

    with_options = _compiled_when_called(compiler, dynamic=False)(lambda x: x)
    plain = _compiled_when_called(compiler, lambda x: x)
    assert calls == []
    assert (with_options(1), with_options(2), plain(3)) == (2, 3, 4)
    assert calls == [{"dynamic": False}, {}]
