"""From a pipeline and a folder of pictures to a tuned one in one call."""

import pytest
from emloc_diffusers.lora_file import FILE
from emloc_diffusers.pictures import Drawing
from support.pipelines import SHALLOW, flux_pipeline, picture_rows
from support.run import patch_calls

import emloc_core as emloc
from emloc_core.files.documents import read_json


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tune")
    pipeline = flux_pipeline(directory / "pipeline", {**SHALLOW, "in_channels": 4}, vae=False)
    for row in picture_rows(directory / "rows", 8):
        path = directory / "rows" / row["image"].rpartition("/")[2].replace(".png", ".txt")
        path.write_text(row["prompt"])
    with pytest.MonkeyPatch.context() as patch:
        patch_calls(patch)
        emloc.tune(str(pipeline), directory / "rows", directory / "run", memory="2GB", headroom="0", steps=2,
                   batch_size=2, lora_rank=2, paper=True)  # fmt: skip
    return directory / "run"


def test_the_last_adapter_is_one_that_pipelines_load(tuned):
    assert (tuned / "corrected" / FILE).is_file()


def test_pictures_before_and_after_are_on_the_page(tuned):
    answers = read_json(tuned / "answers.json")["answers"]
    assert len(answers) == 2
    assert all(answer[name].startswith("data:image/png;base64,") for answer in answers for name in ("before", "after"))
    assert all(answer["prompt"].startswith("a photo of") for answer in answers)
    page = (tuned / "report.html").read_text()
    assert page.count('<img class="answer" src="data:image/png;base64,') == 6
    assert "img-src data:" in page


def test_they_are_drawn_with_the_guidance_of_the_recipe(tuned, monkeypatch):
    recipe, seen, draw = tuned / "recipe.toml", [], Drawing.draw
    patch_calls(monkeypatch)
    monkeypatch.setattr(
        Drawing, "draw", lambda *args, **options: (seen.append(options["guidance"]), draw(*args, **options))[1]
    )
    recipe.write_text(recipe.read_text().replace("[answers]", "[answers]\nguidance = 0"))
    emloc.run(recipe)
    assert seen == [0] * 4
