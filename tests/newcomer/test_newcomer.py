"""What a newcomer does: short scripts with the README's words alone, each in a fresh directory, on tiny models."""

import runpy
import shlex
from pathlib import Path

import pytest
from emloc_internvl import INTERNVL
from support.rows import example_rows, write_jsonl
from support.vision_models import internvl_processor, picture_rows, save_model

#: The scripts, and what they leave.
SCRIPTS = {
    "fits.sh": ["tuned/adapter", "tuned/answers.json", "tuned/report.html", "tuned/recipe.toml"],
    "does_not_fit.py": ["merged"],
    "images.sh": ["tuned/adapter", "tuned/answers.json"],
    "preferences.sh": ["tuned/adapter"],
    "spreadsheet.sh": ["tuned/merged"],
    "own_script.py": ["corrected"],
    "zoo.sh": [],
}
ROWS = example_rows()[:48]


@pytest.fixture
def here(tmp_path: Path, shallow_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh directory with a model, three models, and rows of every form."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(shallow_model)
    Path("models").mkdir()
    for name in ("one", "two", "three"):
        Path("models", name).symlink_to(shallow_model)
    write_jsonl(Path("train.jsonl"), ROWS)
    wrong = [{**row, "rejected": " no."} for row in ROWS]
    write_jsonl(Path("preferences.jsonl"), [{**row, "chosen": row.pop("completion")} for row in wrong])
    lines = [f"{row['prompt']};{row['completion']};" for row in ROWS]
    Path("sheet.csv").write_text("\n".join(["question;answer;remark", *lines]) + "\n")
    return tmp_path


@pytest.mark.usefixtures("calls_here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_newcomer(script: str, here: Path, emloc) -> None:
    path = Path(__file__).parent / script
    if script == "images.sh":
        Path("model").unlink()
        save_model(Path("model"), INTERNVL, "internvl", internvl_processor())
        picture_rows(Path("pictures"), text_rows=False)
    if path.suffix == ".py":
        runpy.run_path(str(path), run_name="__main__")
    for line in path.read_text().splitlines() if path.suffix == ".sh" else []:
        if not line.startswith("#"):
            code, _, err = emloc(*shlex.split(line)[1:])
            assert code == 0, f"{line}\n{err}"
    assert [name for name in SCRIPTS[script] if not (here / name).exists()] == []
