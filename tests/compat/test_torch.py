"""What ``compat/torch.py`` needs of torch."""

import subprocess
import sys
import weakref

import pytest
import torch
from support.contracts import contract
from torch import nn

from emloc_core.compat import torch as compat
from emloc_core.memory.fake import without_contents


@contract("torch", "compat.torch.fake_tensors")
def test_fake_tensors_have_shapes_and_a_device_but_take_no_room():
    with compat.fake_tensors(whole_numbers=False):
        big = torch.empty(1 << 20, 1 << 20)
        product = big @ big
        assert product.shape == big.shape, "a fake product has another shape"
        assert product.device.type == "cpu", "a fake tensor is on another device"
        assert compat.storage_of(product).nbytes() == 4 << 40, "a fake storage does not say its size"
    assert not compat.has_contents(product), "tensors that are made in the mode are not fake"


@contract("torch", "compat.torch.fake_tensors")
def test_a_step_on_fake_tensors_is_one_on_real_ones():
    def step():
        weight, bias = nn.Parameter(torch.empty(3, 2)), nn.Parameter(torch.empty(3))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = nn.functional.linear(torch.ones(4, 2), weight, bias)
        hidden.view(2, 2, 3).transpose(0, 1)[0].mul_(2)
        chosen = torch.cat([hidden, hidden.t().contiguous().view(4, 3)])
        chosen.sum().backward()
        tensors = (hidden, chosen, weight.grad, bias.grad)
        return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors], compat.writes(hidden)

    real = step()
    with compat.fake_tensors(whole_numbers=False):
        assert step() == real, "autocast, autograd, views or writes in place differ"


@contract("torch", "compat.torch.fake_tensors")
def test_what_is_written_in_place_stays_the_same_tensor():
    with compat.fake_tensors(whole_numbers=False):
        tensor, result = torch.zeros(3), torch.empty(2, 2)
        assert tensor.add_(1) is tensor
        assert torch.mm(torch.ones(2, 5), torch.ones(5, 2), out=result) is result


@contract("torch", "compat.torch.fake_tensors")
def test_whole_numbers_are_known():
    with compat.fake_tensors(whole_numbers=True):
        places = torch.arange(6).reshape(2, 3)
        assert (places.sum(1) + 1).tolist() == [4, 13], "integers computed from arange are not known"
        chosen = torch.zeros(2, 3)[places > 2]
        assert chosen.shape == (3,), "a known mask does not give the shape of what it selects"
        assert not compat.has_contents(chosen), "what is chosen from fake numbers is real"
        assert torch.repeat_interleave(places[0], places[0]).tolist() == [1, 2, 2]
        pairs = torch.arange(1 << 12)[:, None] < torch.arange(1 << 12)
        assert not compat.has_contents(pairs), "large tensors are computed"


@contract("torch", "compat.torch.fake_tensors")
def test_numbers_that_code_writes_are_known():
    with compat.fake_tensors(whole_numbers=False):
        assert (torch.tensor(3.5) * 2).item() == 7
        assert not compat.has_contents(torch.arange(3))


@contract("torch", "compat.torch.fake_tensors")
def test_what_is_on_the_meta_device_stays_there():
    stack = torch.empty(1 << 10, 1 << 10, 8, device="meta")
    with compat.fake_tensors(whole_numbers=False):
        assert stack.mT.is_meta


@contract("torch", "compat.torch.fake_tensors")
def test_what_depends_on_contents_is_named():
    with compat.fake_tensors(whole_numbers=False), pytest.raises(NotImplementedError, match=r"aten\.nonzero.* numbers"):
        torch.ones(3).nonzero()


@contract("torch", "compat.torch.fake_tensors")
def test_checks_of_contents_are_left_out():
    with compat.fake_tensors(whole_numbers=False):
        torch._check_tensor_all(torch.ones(2) > 2, lambda: "unequal")


@contract("transformers", "compat.torch.fake_tensors")
def test_masks_without_contents_are_not_looked_into():
    from transformers.utils.import_utils import is_tracing

    with compat.fake_tensors(whole_numbers=False):
        assert is_tracing(torch.ones(2, 2)), "is_tracing does not ask is_fake_tensor"


@contract("transformers", "compat.torch.fake_tensors")
def test_fused_experts_run_on_fake_tensors():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MixtralConfig(vocab_size=9, num_local_experts=4, num_key_value_heads=1, **sizes)
    model = MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")
    with compat.fake_tensors(whole_numbers=False):
        without_contents(model)
        logits = model(input_ids=torch.zeros(2, 3, dtype=torch.int64)).logits
        assert logits.shape == (2, 3, 9), "the products of experts do not go through moe._grouped_mm"


@contract("torch", "compat.torch.DispatchMode")
def test_a_dispatch_mode_sees_every_operation():
    seen = []

    class Watch(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    assert not hasattr(Watch.__torch_dispatch__, "__wrapped__"), "torch wraps the mode for its compiler"
    with compat.fake_tensors(whole_numbers=False), Watch():
        weight = nn.Parameter(torch.empty(2, 2))
        (torch.empty(2, 2) @ weight).sum().backward()
    assert seen.count(torch.ops.aten.mm) == 2, f"products are not seen once each: {seen}"


@contract("torch", "compat.torch.storage_id")
def test_a_storage_has_a_number_and_tells_when_it_goes():
    with compat.fake_tensors(whole_numbers=False):
        tensor, other = torch.empty(3), torch.empty(3)
        number = compat.storage_id(compat.storage_of(tensor))
        assert number == compat.storage_id(compat.storage_of(tensor.view(1, 3))), "a view has another storage"
        assert number != compat.storage_id(compat.storage_of(other)), "two storages have one number"
        gone = []
        kept = weakref.ref(compat.storage_of(tensor), gone.append)
        assert not gone, "a storage's object does not live as long as the storage"
        del tensor
        assert gone == [kept], "a weak reference is not told that a storage is freed"


@contract("torch", "compat.torch.writes")
def test_writes_in_place_are_counted():
    tensor = torch.ones(3)
    before = compat.writes(tensor)
    assert compat.writes(tensor) == before
    tensor[1:].add_(1)
    assert compat.writes(tensor) == before + 1, "_version does not count what is written to a view"


@contract("torch", "compat.torch.children")
def test_a_module_that_is_there_twice_is_listed_twice():
    shared = nn.Linear(1, 1)
    listed = compat.children(nn.ModuleList([shared, shared]))
    assert listed == [("0", shared), ("1", shared)], "_modules does not hold the modules right below"


def test_importing_torch_runs_the_entry_point():
    """By it, plain transformers loads emulators; see ``emloc_core/compat/autoload.py``."""
    script = "import sys, torch; print('emloc_core.compat.autoload' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with contract("torch", "compat.imports.when_imported"):
        assert done.stdout == "True\n", "importing torch does not run entry points of the group torch.backends"


@contract("torch", "exact.steps")
def test_of_the_nodes_that_are_ready_the_one_made_last_runs_first():
    """So the last block of all micro-batches is recomputed before the block before it is."""
    order = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            order.append(ctx.name)
            return gradient, None

    x = torch.ones((), requires_grad=True)
    first = [Node.apply(x, f"block 1 of {row}") for row in "ab"]
    second = [Node.apply(tensor, f"block 2 of {row}") for tensor, row in zip(first, "ab", strict=True)]
    torch.stack(second).sum().backward()
    assert order == ["block 2 of b", "block 2 of a", "block 1 of b", "block 1 of a"], f"autograd runs {order}"


@contract("torch", "compat.torch.tree_leaves, torch.tree_map")
def test_trees_are_tuples_lists_and_dicts():
    tree = (torch.ones(2), [1, {"a": torch.zeros(1)}])
    doubled = compat.tree_map(lambda leaf: leaf * 2, tree)
    assert type(doubled) is tuple, "tree_map does not keep what a tree is of"
    assert [leaf for leaf in compat.tree_leaves(doubled) if isinstance(leaf, int)] == [2], "tree_leaves leaves some out"
    assert doubled[1][1]["a"].shape == (1,)


@contract("torch", "compat.torch.HollowTensor")
def test_a_tensor_without_numbers_says_what_operations_give():
    calls = []

    class Seven(compat.HollowTensor):
        @classmethod
        def compute(cls, operation, *args):
            calls.append((operation, len(args)))
            return torch.full((2, 3), 7.0)

    tensor = Seven.hollow((4, 3), torch.zeros(1, dtype=torch.bfloat16))
    assert (tensor.shape, tensor.dtype) == ((4, 3), torch.bfloat16), "it has another shape or dtype"
    assert not tensor.requires_grad, "it asks for a gradient"
    assert torch.equal(tensor[1:3], torch.full((2, 3), 7.0)), "its slices are not what it says"
    nn.functional.embedding(torch.tensor([1, 2]), tensor)
    aten = torch.ops.aten
    assert [operation for operation, _ in calls] == [aten.slice.Tensor, aten.embedding.default], (
        f"it is asked for {calls}"
    )
