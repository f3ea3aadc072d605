"""What a GPU computes is what the CPU does: layers, fitting, exact steps from pinned memory, stages.

``make test-gpu`` has kernels compiled, not interpreted; Triton reads that when it is imported.
"""

import multiprocessing
import os

import pytest
import torch
from support.layers import FORMATS, M, N, layer
from transformers import AutoModelForCausalLM

from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.compress import Compress
from emloc_core.exact.lora import lora_on
from emloc_core.exact.steps import ExactSteps
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.meter import Meter
from emloc_core.model.cap import cap_gpus
from emloc_core.model.device import choose_device, free_of
from emloc_core.model.opened import open_model
from emloc_core.model.overhead import overhead
from emloc_core.model.streaming import Stream
from emloc_core.model.weights import FrozenWeights
from emloc_core.requests import CompressRequest
from emloc_core.settings import CompressSettings, TrainSettings
from emloc_core.standins import Trellis
from emloc_core.tuning.trl import lora_config

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Kernels are compiled, not interpreted as in the tests that need no GPU."""
    assert os.environ["TRITON_INTERPRET"] == "0", "run `make test-gpu`"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_layer_computes_what_it_does_on_the_cpu(format, dtype):
    on_cpu, on_gpu = layer(format, dtype, "cpu"), layer(format, dtype, "cuda")
    if isinstance(format, Trellis):
        assert torch.equal(on_gpu.unpacked().cpu(), on_cpu.unpacked())
    x = torch.randn(33, N, dtype=dtype)
    inputs = [x.clone().requires_grad_(), x.to("cuda").requires_grad_()]
    outputs = [module(input) for module, input in zip((on_cpu, on_gpu), inputs, strict=True)]
    for output in outputs:
        output.float().square().sum().backward()
    for cpu, gpu in (outputs, [input.grad for input in inputs]):
        assert (gpu.cpu() - cpu).norm() <= 0.02 * cpu.norm()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_is_fitted_is_as_good(format):
    weight, inputs, errors = torch.randn(M, N) / N**0.5, torch.randn(4 * N, N), []
    for device in ("cpu", "cuda"):
        gram = Gram("input", N, device=device)
        gram.add(inputs.to(device))
        (fitted,) = format.fit([weight.to(device)], gram, [64])
        errors.append(fitted.error or fitted.relative_error())
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_units_come_from_pinned_memory_as_they_are(tiny_model):
    skeleton = open_model(str(tiny_model), "cpu").skeleton
    expected = {}
    for block in skeleton.blocks:
        with skeleton.parameters(skeleton.names(block)) as tensors:
            expected[block] = {name.removeprefix(f"{block}."): tensor.clone() for name, tensor in tensors.items()}
    # All stay in pinned memory; or they pass through one buffer, and are copied before or when they are asked for.
    for options in ({"pinned": float("inf")}, {}, {"begins": False}):
        weights = FrozenWeights(skeleton, skeleton.blocks, torch.device("cuda"), **options)
        weights.expect(skeleton.blocks)
        for block in skeleton.blocks * 3:
            parameters = weights.parameters(block)
            assert all(torch.equal(parameters[name].cpu(), tensor) for name, tensor in expected[block].items())
        weights.close()


def test_streamed_rows_have_the_logits_of_the_whole_model(tiny_model):
    skeleton = open_model(str(tiny_model), "cuda").skeleton
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto").eval().to("cuda")
    rows = [torch.randint(3, 40, (1, length), device="cuda") for length in (5, 17, 9)]
    stream = Stream(skeleton)
    assert stream.pins
    logits = stream.run([lambda ids=ids: skeleton.model(input_ids=ids, use_cache=False).logits for ids in rows])
    with torch.no_grad():
        assert all(torch.equal(actual, model(input_ids=ids).logits) for ids, actual in zip(rows, logits, strict=True))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_layer_does_not_wait_for_the_gpu(format):
    module, x = layer(format, torch.bfloat16, "cuda"), torch.randn(33, N, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()
    module(x).sum().backward()  # the first time, kernels are compiled and tables copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocate(path):
    """Take 2 GiB of a GPU of which 1 GiB is allowed beside the context, and write the outcome."""
    cap_gpus((1 << 30) + overhead("cuda", tuning=True))
    outcome = {"free": free_of(0)}
    try:
        torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        outcome["refused"] = True
    torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    write_json(path, {**outcome, **Meter().read()})


def test_no_more_than_the_cap_is_taken(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=allocate, args=(tmp_path / "told.json",))
    process.start()
    process.join()
    assert process.exitcode == 0
    outcome = read_json(tmp_path / "told.json")
    assert outcome["refused"]
    assert outcome["free"] <= 1 << 30
    assert 1 << 29 <= outcome["peak_gpu_bytes"] <= outcome["peak_gpu_reserved_bytes"] <= 1 << 30


def test_exact_steps_have_the_gradients_of_the_cpu(tiny_model):
    model = open_model(str(tiny_model), "cpu")
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 40, (3, 1, 20))]
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        lora = lora_on(model.skeleton, lora_config(TrainSettings(), model.family.lora_targets()), device).train()
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape) / 10)  # a GPU draws other numbers
        steps = ExactSteps(lora.get_base_model(), model.skeleton, torch.device(device))
        steps.loss(batches)
        gradients.append([p.grad.cpu() for p in lora.parameters() if p.grad is not None])
        steps.close()
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_an_emulator_is_made_on_the_gpu_by_default(tiny_model, rows_file, tmp_path):
    assert choose_device("auto").type == "cuda"
    settings = CompressSettings(kind="trellis", samples=8, selection=0)
    paths = {"model": str(tiny_model), "data": str(rows_file), "output": tmp_path / "emulator"}
    emulator = Compress(CompressRequest(**paths, settings=settings)).run()
    skeleton = open_model(str(emulator), "cuda").skeleton
    skeleton.load(skeleton.blocks[0])
    assert all(parameter.is_cuda for parameter in skeleton.model.get_submodule(skeleton.blocks[0]).parameters())
