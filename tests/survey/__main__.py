"""``python -m survey``: a whole run on a tiny model of every architecture of transformers; resumes.

Run by `make families-survey`. Each model type is tried in a process of its own, within limits. What came of it is a
line of ``benchmarks/results/survey.jsonl``; the page ``docs/survey.md`` is written from these.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib import import_module
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", EMLOC_CACHE="")

from survey.page import RESULTS, results, write  # noqa: E402

#: Limits of one model type: processor time in seconds, and bytes.
SECONDS, MEMORY = 300, 12 << 30


def main() -> None:
    """Try what has not been tried yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="Write the page from the results that are there, and stop.")
    parser.add_argument("--again", nargs="+", default=[], metavar="OUTCOME", help="Try types of these outcomes again.")
    parser.add_argument("types", nargs="*", help="Model types to try; default: all that have no result yet.")
    options = parser.parse_args()
    previous = results()
    finished = [name for name, result in previous.items() if result["outcome"] not in options.again]
    types = [] if options.page else options.types or [name for name in model_types() if name not in finished]
    for count, name in enumerate(types, 1):
        result = attempt(name)
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        line = f"{count}/{len(types)} {name}: {result['outcome']} ({result['seconds']} s) {result['why']}"
        print(line[:400], flush=True)
    write()


def model_types() -> dict[str, str]:
    """Return every model type with the class of its model: text, or image-text where it has both."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    text = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text")
    return dict(sorted({**text, **dict.fromkeys(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "image-text")}.items()))


def attempt(name: str) -> dict[str, Any]:
    """Try a model type in a process of its own, and return the result, whatever becomes of the process."""
    import transformers

    import_module("survey.run")  # once, for all children
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as answer:
                json.dump(limited(name), answer)
        finally:  # the parent may be gone, and this process must not take its place
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    why = f"the process ended with code {code}: of time or memory, more than the limit"
    outcome = json.loads(text) if text else {"outcome": "crashed", "why": why, "seconds": SECONDS}
    return {"type": name, "class": model_types()[name], "transformers": transformers.__version__, **outcome}


def limited(name: str) -> dict[str, Any]:
    """Try one model type within the limits."""
    from survey.run import survey

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if not os.environ.get("SURVEY_TALKS"):
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    started = time.process_time()
    return {**survey(name), "seconds": round(time.process_time() - started, 1)}


if __name__ == "__main__":
    sys.exit(main())
