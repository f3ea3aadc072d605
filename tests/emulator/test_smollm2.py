"""The factorisation on a real model's activations, against the textbook method. Minutes: `make test-slow`."""

from contextlib import contextmanager

import pytest
import torch
from emloc_demo.data import write_data
from emloc_demo.model import write_base
from support.jobs import compress_job

from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.hooks import tapped
from emloc_core.model.streaming import Stream
from emloc_core.settings import CompressSettings


def textbook(weight, inputs, rank):
    """Whitening and SVD: S S^T = G, the truncated SVD of W S, times the inverse of S. All in fp64."""
    energies, vectors = torch.linalg.eigh(inputs.T @ inputs)
    roots = energies.clamp(min=energies.max() * 1e-15).sqrt()
    u, s, vh = torch.linalg.svd(weight @ (vectors * roots), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ (vectors / roots).T


@pytest.mark.slow
def test_error_is_at_most_that_of_the_textbook_method_on_every_linear(tmp_path):
    base = Checkpoint(write_base(tmp_path / "base"))
    train, _ = write_data(tmp_path / "data")
    settings = CompressSettings(kind="low-rank", calibration="base", samples=32, selection=8)
    job = compress_job(base, train, tmp_path / "emulator", settings)
    emulator = Checkpoint(job.run())
    ratios = {}

    @contextmanager
    def compare(block):
        planned = job.plan.in_block(block)
        firsts = {linear.path: linear for linear in planned if linear.path == linear.group[0]}
        seen = {path: [] for path in firsts}
        modules = {path: job.base.skeleton.model.get_submodule(path) for path in firsts}
        with tapped(modules, dict.fromkeys(firsts, "input"), lambda path, x: seen[path].append(x[0].double())):
            yield
        for linear in planned:
            inputs = torch.cat(seen[linear.group[0]])
            weight = job.base.skeleton.model.get_parameter(f"{linear.path}.weight").double()
            with emulator.slices([f"{linear.path}.weight", f"{linear.path}.V"]) as slices:
                u, v = (tensor[...].double() for tensor in slices.values())
            ours = ((weight - u @ v) @ inputs.T).norm()
            theirs = ((weight - textbook(weight, inputs, linear.rank)) @ inputs.T).norm()
            ratios[linear.path] = float(ours / theirs)

    def visit(unit):
        return compare(unit) if job.plan.in_block(unit) else None

    forwards = [
        lambda sample=sample: job.base.skeleton.model(**sample.inputs("cpu"), use_cache=False) for sample in job.samples
    ]
    Stream(job.base.skeleton).run(forwards, visit, "model.layers.29")
    worst = max(ratios, key=ratios.get)
    print(f"{len(ratios)} Linears; worst ratio {ratios[worst]:.6f} at {worst}")
    assert len(ratios) == 210
    assert ratios[worst] <= 1.0005
