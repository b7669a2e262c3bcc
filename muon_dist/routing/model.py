"""Facts about a model's parameters: where each is registered, its module, and its logical shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
CONVOLUTIONS = nn.modules.conv._ConvNd
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_MATRICES = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
# Name endings that weight_norm, spectral_norm and pruning of torch.nn.utils give to a replaced `weight`.
_OLD_WRAPPERS = ("_v", "_orig", "_g")

Kind = Literal["table", "matrix", "norm", "convolution"]


def logical_shape(p: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter.

    DeepSpeed's `zero.Init` partitions a parameter when it is made: its shape is (0,), and the whole shape is in
    `ds_shape`. A DTensor's shape is already the global shape.
    """
    return tuple(int(n) for n in getattr(p, "ds_shape", p.shape))


def expert_group(p: torch.Tensor) -> str | None:
    """DeepSpeed's name of the process group with copies of this expert; None for a parameter of no DeepSpeed expert.

    `deepspeed.moe.layer.MoE` sets `allreduce = False` on its experts: their gradients are not averaged over all ranks.
    """
    return None if getattr(p, "allreduce", True) else getattr(p, "group_name", None)


@dataclass(frozen=True)
class Use:
    """One place in the module tree where a parameter is registered.

    owner, role: the module whose weight it is, and the name of this weight. They differ from `module` and `attribute`
    if torch stores a wrapped weight elsewhere: `parametrizations.weight.original`, `weight_v`, `weight_orig`.
    """

    fqn: str
    module: nn.Module
    attribute: str
    owner: nn.Module
    role: str


def uses_of(model: nn.Module) -> list[tuple[nn.Parameter, list[Use]]]:
    """Every parameter of the model with its places of registration (several for a tied parameter)."""
    found: dict[int, tuple[nn.Parameter, list[Use]]] = {}
    owners: dict[int, tuple[nn.Module, str]] = {}  # owners of parametrization lists
    for prefix, module in model.named_modules(remove_duplicate=False):
        lists = module._modules.get("parametrizations")
        for name, kept in lists._modules.items() if isinstance(lists, nn.ModuleDict) else ():
            owners[id(kept)] = (module, name)
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owner, role = owners.get(id(module), (module, _unwrapped(module, attribute)))
                if isinstance(module, ParametrizationList) and not attribute.startswith("original"):
                    owner, role = module, attribute
                use = Use(f"{prefix}.{attribute}" if prefix else attribute, module, attribute, owner, role)
                found.setdefault(id(parameter), (parameter, []))[1].append(use)
    return list(found.values())


def _unwrapped(module: nn.Module, attribute: str) -> str:
    """The original name: `weight` for `weight_v` and similar names, if the module has no parameter `weight`."""
    for ending in _OLD_WRAPPERS:
        base = attribute.removesuffix(ending)
        if base != attribute and base not in module._parameters and hasattr(module, base):
            return base
    return attribute


def kind_of(use: Use) -> Kind | None:
    """The role of a parameter by the type of its module; None for an unknown type.

    A subclass has the role of its parent. So has a module with the attributes of `nn.Linear` (`in_features` and
    `out_features`) or `nn.Embedding` (`num_embeddings` and `embedding_dim`), such as a tensor-parallel or quantized
    layer.
    """
    owner, name = use.owner, use.role
    if isinstance(owner, NORMS):
        return "norm"
    if isinstance(owner, CONVOLUTIONS):
        return "convolution"
    if isinstance(owner, nn.MultiheadAttention):
        return "matrix" if name.endswith("proj_weight") else None
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return "matrix" if name.startswith("weight_") else None
    if name != "weight":
        return None
    if isinstance(owner, _TABLES) or _has_sizes(owner, "num_embeddings", "embedding_dim"):
        return "table"
    if isinstance(owner, _MATRICES) or is_conv1d(owner) or _has_sizes(owner, "in_features", "out_features"):
        return "matrix"
    return None


def _has_sizes(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in names)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (GPT-2), a linear layer that stores its weight as (in, out)."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def offered(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """The results of each submodule's `method()` (Hugging Face models, also inside wrappers), without None."""
    for module in model.modules():
        if callable(offer := getattr(module, method, None)):
            with contextlib.suppress(NotImplementedError, AttributeError):  # backbones without a text embedding
                if isinstance(found := offer(), nn.Module):
                    yield found


def is_transposed(use: Use, shape: tuple[int, ...]) -> bool:
    """Whether a weight is stored (in, out): transformers' Conv1D, and fused experts with `is_transposed` (gpt-oss)."""
    if len(shape) == 2:
        return use.role == "weight" and is_conv1d(use.owner)
    return len(shape) == 3 and getattr(use.module, "is_transposed", False) is True


def storage_of(p: torch.Tensor) -> tuple[int, int, int] | None:
    """(storage, offset, elements): equal for two parameters with the same memory; None without memory."""
    local = getattr(p, "_local_tensor", p)
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        if local.numel() and local.untyped_storage().nbytes():
            return local.untyped_storage()._cdata, int(local.storage_offset()), int(local.numel())
    return None
