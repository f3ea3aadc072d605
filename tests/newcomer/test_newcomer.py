"""What a newcomer does: short scripts with the README's words alone, each in a fresh directory, on tiny models."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from support.models import save_in_four_bits, save_tiny_model
from support.rows import example_rows, write_jsonl
from support.vision_models import internvl_processor, picture_rows, save_model

HERE = Path(__file__).parent
#: The scripts, and what they leave.
SCRIPTS = {
    "fits.sh": ["tuned/adapter", "tuned/answers.json", "tuned/report.html", "tuned/recipe.toml"],
    "does_not_fit.py": ["merged"],
    "images.sh": ["tuned/adapter", "tuned/answers.json"],
    "preferences.sh": ["tuned/adapter"],
    "spreadsheet.sh": ["tuned/merged"],
    "four_bits.sh": ["tuned/adapter", "tuned/answers.json", "evaluation", "merged"],
    "no_plugin.sh": ["tuned/adapter", "merged"],
    "own_script.py": ["corrected"],
    "notebook.ipynb": ["tuned/adapter", "adapter-corrected"],
    "zoo.sh": ["zoo/jobs/one", "zoo/jobs/two", "zoo/jobs/three"],
}
#: What is tried with every change: where the model fits, and where it does not.
ALWAYS = ("fits.sh", "does_not_fit.py")
ROWS = example_rows()[:48]


@pytest.fixture
def workspace(tmp_path: Path, shallow_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh directory with a model, and rows of every form."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(shallow_model)
    write_jsonl(Path("train.jsonl"), ROWS)
    wrong = [{**row, "rejected": " no."} for row in ROWS]
    write_jsonl(Path("preferences.jsonl"), [{**row, "chosen": row.pop("completion")} for row in wrong])
    lines = [f"{row['prompt']};{row['completion']};" for row in ROWS]
    Path("sheet.csv").write_text("\n".join(["question;answer;remark", *lines]) + "\n")
    return tmp_path


def prepare(script: str) -> None:
    """Put other models and rows in the directory, for scripts that are about them."""
    if script == "images.sh":
        Path("model").unlink()
        save_model(Path("model"), INTERNVL, "internvl", internvl_processor())
        picture_rows(Path("pictures"), text_rows=False)
    elif script == "no_plugin.sh":
        Path("model").unlink()
        save_tiny_model(LLAMA.tiny_configs[0] | {"model_type": "granite", "num_hidden_layers": 1}, Path("model"))
    elif script == "zoo.sh":
        for name, width in (("one", 32), ("two", 48), ("three", 64)):
            save_tiny_model(
                LLAMA.tiny_configs[0] | {"num_hidden_layers": 1, "intermediate_size": width}, Path("models") / name
            )
    elif script == "four_bits.sh":
        Path("model").unlink()
        wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}  # as bitsandbytes' kernels need
        save_in_four_bits(save_tiny_model(LLAMA.tiny_configs[0] | wide, Path("model")), Path("packed"))


def program(path: Path) -> str:
    """Return the source of a Python script, or of a notebook's cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


@pytest.mark.usefixtures("calls_here")
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.thorough)
        for name in sorted(SCRIPTS.keys() - {"zoo.sh"})
    ],
)
def test_a_newcomer(script: str, workspace: Path, emloc) -> None:
    path = HERE / script
    prepare(script)
    if path.suffix != ".sh":
        exec(compile(program(path), script, "exec"), {"__name__": "__main__"})
    for line in path.read_text().splitlines() if path.suffix == ".sh" else []:
        if not line.startswith("#"):
            code, _, err = emloc(*shlex.split(line)[1:])
            assert code == 0, f"{line}\n{err}"
    assert [name for name in SCRIPTS[script] if not (workspace / name).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_newcomer_with_processes_of_their_own(script: str, workspace: Path) -> None:
    """As above, as they would run it: a shell or an interpreter, with nothing of the test's in it."""
    path = HERE / script
    prepare(script)
    command = ["bash", "-e", str(path)] if path.suffix == ".sh" else [sys.executable, "-c", program(path)]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(command, env={**os.environ, "PATH": search}, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert [name for name in SCRIPTS[script] if not (workspace / name).exists()] == []
