"""The notebooks in examples/ run from top to bottom: quickly on a tiny model, slowly as they are."""

import json
import shutil

import emloc_demo.data
import emloc_demo.model
import pytest
from emloc_demo.data import FIELDS
from support.paths import EXAMPLES
from support.rows import example_rows

FIRST = EXAMPLES / "first_model.ipynb"


def run(notebook, **replaced):
    """Run a notebook's cells, some text in them replaced; return its variables."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for old, new in replaced.items():
        assert f"{old}=" in source
        source = source.replace(f"{old}=", f"{old}={new} or ")
    variables = {"__name__": "__main__"}
    exec(compile(source, notebook.name, "exec"), variables)
    return variables


def test_the_first_notebook_goes_from_a_model_to_an_answer(shallow_model, tmp_path, monkeypatch):
    conversations = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in example_rows()
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emloc_demo.model, "write_base", lambda directory: shutil.copytree(shallow_model, directory))
    monkeypatch.setattr(emloc_demo.data, "make_rows", lambda: (conversations, conversations[:1]))
    variables = run(FIRST, steps=2, max_new_tokens=4)
    assert [variables[name].kind for name in ("emulator", "adapter", "corrected", "merged")] == [
        "emulator",
        "adapter",
        "corrected-adapter",
        "checkpoint",
    ]
    assert isinstance(variables["answer"], str)


@pytest.mark.slow
def test_the_first_notebook_answers_in_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(json.loads(run(FIRST)["answer"])) == set(FIELDS)
