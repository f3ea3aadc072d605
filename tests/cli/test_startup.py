"""Commands that need no model import nothing heavy, with every plugin of the tree loaded."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "lm_eval", "numpy", "matplotlib", "accelerate")
SCRIPT = f"""
import json, sys
from emloc_core.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["families"], ["families", "--json"], ["train", "--help"]]
)
def test_nothing_heavy_is_imported(command):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, check=True)
    *answer, heavy = done.stdout.splitlines()
    assert json.loads(heavy) == []
    assert answer
