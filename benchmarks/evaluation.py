"""Memory of an evaluation by the likelihood of answers, beside lm-eval's own model, on SmolLM2-135M in bf16.

Sixteen rows of some 1,000 tokens with answers of some 40, eight at a time: each model in a process of its own.
"""

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from emloc_demo.data import write_data
from emloc_demo.model import write_base
from harness import goal, in_process, markdown, write_results

ROWS, BATCH = 16, 8
#: Words of a prompt, at least and at most; and of an answer.
PROMPT, ANSWER = (440, 560), 20


def measure(base: str, rows: str, ours: bool) -> dict[str, Any]:
    """Return the mean log-likelihood of an answer, by our model or by lm-eval's."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from emloc_core.evaluation.loading import load_system
    from emloc_core.evaluation.text_lm import TextLM

    model, tokenizer = load_system(Path(base), None)
    if ours:
        lm: Any = TextLM(model, tokenizer=tokenizer, batch_size=BATCH)
    else:
        lm = HFLM(model, tokenizer=tokenizer, batch_size=BATCH, softmax_dtype="float32")
    pairs = json.loads(Path(rows).read_text(encoding="utf-8"))
    scored = lm.loglikelihood([Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)])
    assert torch.tensor([one for one, _ in scored]).isfinite().all()
    return {"loglikelihood": sum(one for one, _ in scored) / len(scored)}


def write_rows(directory: Path) -> Path:
    """Write prompts and answers, drawn from the demo's messages one after the other."""
    write_data(directory, short=False)
    lines = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(turn["content"] for line in lines for turn in json.loads(line)["messages"]).split()
    draw, pairs = random.Random(0), []
    for _ in range(ROWS):
        size = draw.randint(*PROMPT)
        start = draw.randrange(len(words) - size - ANSWER)
        end = start + size
        pairs.append((" ".join(words[start:end]), " " + " ".join(words[end : end + ANSWER])))
    file = directory / "pairs.json"
    file.write_text(json.dumps(pairs), encoding="utf-8")
    return file


def main() -> None:
    """Measure both, and write the results."""
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_base(directory / "base", "bfloat16")
        rows = write_rows(directory)
        measured = [
            {"model": name, **in_process(measure, directory / "base", rows, ours)}
            for name, ours in (("lm-eval's", False), ("emloc's", True))
        ]
    theirs, ours = measured
    ratio = ours["peak_rss_bytes"] / theirs["peak_rss_bytes"]
    differs = abs(ours["loglikelihood"] / theirs["loglikelihood"] - 1)
    goals = [
        goal("peak memory, over lm-eval's", "at most 0.33", round(ratio, 2), ratio <= 0.33),
        goal("relative difference of the likelihoods", "at most 0.001", round(differs, 5), differs <= 0.001),
    ]
    header = ["model", "peak, GB", "log-likelihood of an answer"]
    cells = [[row["model"], round(row["peak_rss_bytes"] / 1e9, 2), round(row["loglikelihood"], 3)] for row in measured]
    write_results("evaluation", "make bench-evaluation", measured, goals, markdown(header, cells))


if __name__ == "__main__":
    main()
