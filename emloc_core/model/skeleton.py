"""A model whose parameters are loaded on demand.

The skeleton is an ordinary transformers model on the meta device, with its buffers (rotary tables) computed.
Checkpoint keys are not module names (legacy prefixes, fused tensors): tensors are mapped and converted as transformers
does it (:class:`~emloc_core.compat.transformers.TensorLoader`).
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from emloc_core.compat import halves
from emloc_core.compat.torch import writes
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.header import TensorInfo
from emloc_core.files.quantised import MXFP4
from emloc_core.files.shards import DTYPES, chunks
from emloc_core.model.absent import Absent
from emloc_core.model.blocks import block_paths
from emloc_core.model.packed_checkpoints import PACKED
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.transposed import TransposedLinear, as_linears

#: Bytes from which a tensor gets no memory while a model is built: a stack of experts may have 15 GB.
_LARGE = 1 << 30
_CHUNK = 4 << 20  # bytes read ahead at a time
#: Modules of functions that draw initial weights: transformers' call torch's, and models either.
_INITIAL = ("transformers.initialization", "torch.nn.init")


class Skeleton:
    """An ordinary model, or an emulator, over a checkpoint, loaded part by part.

    Args:
        device: device of loaded weights.

    Attributes:
        model: the model in eval mode; every parameter on the meta device, requiring no gradient, though it says that it
            is on ``device``.
        dtype: the dtype that weights are loaded in: the checkpoint's own.
        block_lists: module paths of the lists of blocks, in execution order.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Any, device: torch.device) -> None:
        self.checkpoint, self.family, self.device, self._config = checkpoint, family, device, config
        self.dtype = config.dtype or most_common_dtype(checkpoint.tensors.values())
        halves.serve(self.dtype)
        self.model = build_model(config, family, self.dtype)
        quantisation = checkpoint.config.get("quantization_config") or {}
        method = str(quantisation.get("quant_method"))
        if method not in PACKED:
            checkpoint.require_unquantised()
        #: Parts of stacks of experts in MXFP4, which are unpacked as they are read.
        self._packed = {key for key in checkpoint.tensors if method == MXFP4 and key.endswith(("_blocks", "_scales"))}
        conversions = PACKED[method](self.model, quantisation) if quantisation else []
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}) or {})
        absents: dict[nn.Parameter, Absent] = {}
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
            for name, parameter in module.named_parameters(recurse=False):
                absent = absents.setdefault(parameter, Absent.like(parameter, self.device))  # tied ones stay tied
                setattr(module, name, absent)
        self.block_lists = [tower.blocks for tower in family.towers]
        self._replaced: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._loader = checkpoint.objective.tensor_loader(self.model, conversions)
        self._sources = self._map_keys()
        transposed = (path for path, module in self.model.named_modules() if isinstance(module, TransposedLinear))
        self._transposed = {key for path in transposed for key in self.sources(f"{path}.weight")}
        # Buffers in the checkpoint (a router's bias, say) are small, and loaded from the start.
        self._read([name for name, _ in self.model.named_buffers() if name in self._sources])

    @cached_property
    def blocks(self) -> list[str]:
        """The module paths of all blocks, in execution order; see :func:`emloc_core.model.blocks.block_paths`."""
        return block_paths(self.model, self.family)

    def _map_keys(self) -> dict[str, list[str]]:
        """Map every parameter and buffer to the checkpoint keys of the tensors that it is made from."""
        sources = self._loader.sources(self.checkpoint.tensors)
        missing = [name for name, _ in self.model.named_parameters() if self.tied.get(name, name) not in sources]
        if missing:
            raise EmlocError(
                f"{self.checkpoint.directory} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])}).",
                "Check that the checkpoint is complete and that its config.json belongs to it.",
                code="damaged",
            )
        for name, parameter in self.model.named_parameters():
            tensors = [self.checkpoint.tensors[key] for key in sources.get(name, ()) if key not in self._packed]
            if parameter.is_floating_point() and tensors and not any(tensor.is_floating_point for tensor in tensors):
                raise EmlocError(
                    f"{sources[name][0]} in {tensors[0].shard} is a weight of dtype {tensors[0].dtype}, which is not "
                    "floating-point.",
                    "Give the original, unquantised model.",
                    code="unsupported",
                )
        return sources

    def sources(self, parameter: str) -> list[str]:
        """Return the checkpoint keys of the tensors that ``parameter`` is made from, or is tied to."""
        return self._sources.get(self.tied.get(parameter, parameter), [])

    def stored(self, parameter: str) -> list[str]:
        """Return the keys of tensors that the checkpoint holds for ``parameter`` itself, tied or not."""
        return self._sources.get(parameter, [])

    def unpacks(self, keys: Sequence[str]) -> bool:
        """Return whether tensors of the checkpoint are a stack of experts in MXFP4, which is unpacked as it is read."""
        return not self._packed.isdisjoint(keys)

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the checkpoint; a Linear's weight is (out_features, in_features)."""
        shape = self.checkpoint.tensors[key].shape
        return shape[::-1] if key in self._transposed else shape

    def is_transposed(self, key: str) -> bool:
        """Return whether a tensor of the checkpoint is the weight of a Linear, transposed."""
        return key in self._transposed

    def names(self, module: str) -> list[str]:
        """Return the names of the parameters of the submodule at path ``module``."""
        return [f"{module}.{name}" if module else name for name, _ in self._submodule(module).named_parameters()]

    def outside(self, modules: Iterable[str]) -> list[str]:
        """Return the names of the parameters that are in none of these submodules."""
        prefixes = tuple(f"{module}." for module in modules)
        return [name for name, _ in self.model.named_parameters() if not name.startswith(prefixes)]

    def load(self, module: str) -> None:
        """Load the parameters of the submodule at path ``module``.

        Raises:
            EmlocError: a tensor is missing, has another shape than the config says, or was changed before it was there.
        """
        self.load_parameters(self.names(module))

    def load_parameters(self, names: Iterable[str]) -> None:
        """Load parameters by name; see :meth:`load`."""
        sources = {name: self.tied.get(name, name) for name in names}
        for name in sources:
            absent = self.model.get_parameter(name)
            if absent.is_meta and writes(absent):
                raise EmlocError(
                    f"The model's own code changes {name} in place, while it is not in memory.",
                    "EMLoC cannot run such a model one block at a time.",
                    code="unsupported",
                )
        self._read(sources.values())
        merges = any(len(self._sources[source]) > 1 for source in sources.values())
        for name, source in sources.items():
            loaded = self.model.get_parameter(source)
            if loaded.is_meta:
                raise EmlocError(
                    f"{self.checkpoint.directory} lacks the tensor for {source}.",
                    "Check that the checkpoint is complete.",
                    code="damaged",
                )
            loaded.requires_grad_(False)
            if merges and self.device.type == "cpu" and len(self._sources[source]) == 1:
                # One that is a view of the file would keep in memory what stacks were copied from.
                self._set(source, loaded := nn.Parameter(loaded.detach().clone(), requires_grad=False))
            if name != source:
                self._set(name, loaded)
        for source in set(sources.values()) - set(sources):
            self._free_parameter(source)
        for name in sources.keys() & self._replaced.keys():
            new = self._replaced[name](self.model.get_parameter(name))
            self._set(name, nn.Parameter(new, requires_grad=False))

    def replace(self, name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """From now on, whenever a parameter is loaded, replace its value by what ``new`` returns for it."""
        self._replaced[name] = new

    def _read(self, names: Iterable[str]) -> None:
        """Read the tensors that these parameters or buffers are made from into the model."""
        keys = sorted({key for name in names for key in self._sources[name]})
        if not keys:
            return
        with self.checkpoint.slices(keys) as slices:
            tensors = {key: part[...].T if key in self._transposed else part for key, part in slices.items()}
            problems, mismatched = self._loader.load(tensors, self.dtype, self.device)
        for name, reason in problems.items():
            raise EmlocError(
                f"{name} cannot be made from the tensors in {self.checkpoint.directory} ({reason}).",
                "Download or copy the model again.",
                code="damaged",
            )
        for name, shape, expected in mismatched:
            raise EmlocError(
                f"{name} in {self.checkpoint.directory} has shape {tuple(shape)}; the config says {tuple(expected)}.",
                "Check that the config.json belongs to this checkpoint.",
                code="mismatch",
            )

    @cached_property
    def apart(self) -> "Skeleton":
        """Another skeleton of the same model, in the CPU's memory, for another thread while this one is used."""
        other = Skeleton(self.checkpoint, self.family, self._config, torch.device("cpu"))
        other._replaced = self._replaced
        return other

    def lend(self, module: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let tensors, by the names of parameters in a submodule, be its parameters, until it is freed."""
        for name, tensor in tensors.items():
            self._set(f"{module}.{name}", nn.Parameter(tensor, requires_grad=False))

    def read_ahead(self, module: str) -> None:
        """Read the tensors of a submodule from disk in the background, so that :meth:`load` finds them cached."""
        keys = [key for name in self.names(module) for key in self.sources(name)]
        self._reader.submit(_cache, [self.checkpoint.tensors[key] for key in keys])

    def free(self, module: str) -> None:
        """Put the parameters of the submodule at path ``module`` back on the meta device. Buffers stay."""
        for name in self.names(module):
            self._free_parameter(name)

    def _free_parameter(self, name: str) -> None:
        parameter = self.model.get_parameter(name)
        if not parameter.is_meta:
            self._set(name, Absent.like(parameter, self.device))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self._submodule(owner), attribute, parameter)

    def _submodule(self, path: str) -> nn.Module:
        return self.model.get_submodule(path) if path else self.model

    @contextlib.contextmanager
    def parameters(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield parameters by name, loaded during the ``with`` block."""
        names = list(names)
        self.load_parameters(names)
        try:
            yield {name: self.model.get_parameter(name) for name in names}
        finally:
            for name in names:
                self._free_parameter(name)


def build_model(config: Any, family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a config in eval mode: frozen parameters on the meta device, computed buffers, no Conv1D.

    Raises:
        EmlocError: its library does not have the class that the family declares.
    """
    objective = plugin_manager().objective_of(family)
    with init_empty_weights(include_buffers=False), _OnMeta():
        model = as_linears(objective.build(family, deepcopy(config), dtype))  # which may edit it
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    model.eval().requires_grad_(False)
    return model


def _cache(tensors: Iterable[TensorInfo]) -> int:
    """Read tensors into the system's page cache, whose pages are not counted as this process's; return their bytes.

    ``posix_fadvise`` would not do: the kernel limits its read-ahead to about a megabyte.
    """
    total = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.shard, tensor.start)):
        with contextlib.suppress(EmlocError):  # truncated meanwhile; loading the tensor will report it
            for part in chunks(tensor, _CHUNK):
                total += len(part)
    return total


class _OnMeta(TorchFunctionMode):
    """Puts large empty tensors on the meta device at once; others get there when they become parameters.

    Initial weights are not drawn there, which would take longer than all else.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = kwargs.get("tensor")
        if getattr(func, "__module__", None) in _INITIAL and tensor is not None and tensor.is_meta:
            return tensor
        if func is torch.empty and kwargs.get("device") is None:
            tensor = func(*args, **{**kwargs, "device": "meta"})
            if tensor.nbytes >= _LARGE:
                return tensor
        return func(*args, **kwargs)


def most_common_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """Return the dtype of most bytes of the tensors of a checkpoint."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for tensor in tensors:
        if DTYPES[tensor.dtype].is_floating_point:
            sizes[DTYPES[tensor.dtype]] += tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
