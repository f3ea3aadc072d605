"""What ``compat/lm_eval.py`` needs of lm-eval."""

import inspect
from contextlib import suppress
from types import SimpleNamespace

import pytest
from jinja2.exceptions import SecurityError
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager
from support.contracts import contract
from support.rows import write_jsonl

from emloc_core.compat import lm_eval

_TASK = """\
include: shared.yaml
task: sums
doc_to_target: !function sums.answer
"""
_SHARED = """\
dataset_path: json
test_split: test
output_type: generate_until
doc_to_text: "{{ q }}"
"""
_FUNCTION = "def answer(doc):\n    return str(eval(doc['q']))\n"


@pytest.fixture
def task_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"q": "1+1"}, {"q": "2+3"}])
    (tmp_path / "task.yaml").write_text(_TASK)
    (tmp_path / "shared.yaml").write_text(_SHARED)
    (tmp_path / "sums.py").write_text(_FUNCTION)
    return tmp_path / "task.yaml"


@contract("lm-eval", "compat.lm_eval.load_yaml")
def test_a_task_is_made_of_a_files_content_and_changed_data(task_file):
    content = lm_eval.load_yaml(task_file)
    assert content.get("doc_to_text") == "{{ q }}", "load_yaml no longer merges includes"
    assert callable(content["doc_to_target"]), "load_yaml no longer imports functions"
    content["dataset_kwargs"] = {"data_files": {"test": str(task_file.with_name("rows.jsonl"))}}
    tasks = TaskManager(include_defaults=False).load([content])["tasks"]
    assert list(tasks) == ["sums"], "TaskManager.load no longer makes a task of a file's content"
    questions = [(tasks["sums"].doc_to_text(row), tasks["sums"].doc_to_target(row)) for row in tasks["sums"].eval_docs]
    assert questions == [("1+1", "2"), ("2+3", "5")], "a task has other questions and answers than its file says"


@contract("lm-eval", "compat.lm_eval.sandbox_templates")
def test_templates_are_rendered_by_an_environment_that_can_be_replaced(monkeypatch):
    monkeypatch.setattr(utils, "env", utils.env)
    lm_eval.sandbox_templates()
    assert utils.apply_template("{{ q | regex_replace('a', 'b') }}", {"q": "aha"}) == "bhb", "filters are lost"
    with pytest.raises(SecurityError):
        assert not utils.apply_template("{{ ''.__class__.__mro__ }}", {}), "utils.env does not render templates"


@contract("lm-eval", "compat.lm_eval.answer_tokens")
def test_whitespace_at_a_prompts_end_is_scored_with_the_answer(tiny_model):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lm = HFLM(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer=tokenizer)
    seen = []
    lm._loglikelihood_tokens = lambda requests, **_: [seen.append(request[2]) or (0.0, True) for request in requests]
    arguments = ("What? ", "that one")
    lm.loglikelihood([type("Instance", (), {"args": arguments})])
    assert seen == [lm_eval.answer_tokens(lm, *arguments)], "_encode_pair gives other tokens than are scored"


@contract("lm-eval", "compat.lm_eval.ScoresTokens")
def test_likelihoods_and_rolling_ones_are_of_token_ids(tiny_model):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Model(lm_eval.ScoresTokens, HFLM):
        def score(self, answers):
            seen.extend(answers)
            return [(0.0, True) for _ in answers]

    seen = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lm = Model(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer=tokenizer)
    requests = [type("Instance", (), {"args": arguments}) for arguments in (("What?", " that one"), ("What?",))]
    lm.loglikelihood(requests[:1])
    lm.loglikelihood_rolling(requests[1:])
    prompt, both = tokenizer.encode("What?"), tokenizer.encode("What? that one")
    expected = [(prompt, both[len(prompt) :]), ([lm.prefix_token_id], prompt)]
    assert [tuple(map(list, pair)) for pair in seen] == expected, "_loglikelihood_tokens is not given prompt and answer"


@contract("lm-eval", "compat.lm_eval.GivenProcessor")
def test_a_models_processor_is_made_by_a_method(tiny_model):
    """It is given the processor, and may keep it."""
    from transformers import AutoModelForCausalLM

    class Model(lm_eval.GivenProcessor, HFMultimodalLM):
        pass

    processor = SimpleNamespace(tokenizer=None)
    seen = []
    Model.tokenizer = property(lambda self: seen.append(self.processor) or 1 / 0, lambda *_: None)
    with suppress(ZeroDivisionError):
        Model(AutoModelForCausalLM.from_pretrained(tiny_model), tokenizer=processor)
    assert seen == [processor], "_create_tokenizer is not called with the processor before the tokenizer is used"


@contract("lm-eval", "compat.lm_eval.ask")
def test_requests_ask_what_fewshot_context_returns(task_file):
    content = lm_eval.load_yaml(task_file)
    content["dataset_kwargs"] = {"data_files": {"test": str(task_file.with_name("rows.jsonl"))}}
    task = TaskManager(include_defaults=False).load([content])["tasks"]["sums"]
    assert isinstance(task, ConfigurableTask)
    lm_eval.ask(task, lambda doc, **_: f"What is {doc['q']}?")
    task.build_all_requests(rank=0, world_size=1)
    prompts = [instance.args[0] for instance in task.instances]
    assert prompts == ["What is 1+1?", "What is 2+3?"], f"requests are not made by fewshot_context: {prompts}"


def test_likelihoods_of_answers_to_images_are_still_missing():
    """Once lm-eval computes them itself, ``ImageTextLM`` can go."""
    with contract("lm-eval", "compat.lm_eval.GivenProcessor"):
        assert "NotImplementedError" in inspect.getsource(HFMultimodalLM.loglikelihood), "it computes likelihoods now"
        assert issubclass(HFMultimodalLM, TemplateLM), "it is no TemplateLM"
