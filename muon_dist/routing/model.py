"""Facts that a model gives about its parameters: where each is registered, its module, logical shapes."""

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
# What weight_norm, spectral_norm and pruning of torch.nn.utils leave in the place of `weight`.
_OLD_WRAPPERS = ("_v", "_orig", "_g")

Kind = Literal["table", "matrix", "norm", "convolution"]


def logical_shape(p: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter.

    DeepSpeed's `zero.Init` partitions a parameter before anyone sees it and leaves the shape (0,); the whole shape
    is then in `ds_shape`. A DTensor reports its global shape by itself.
    """
    return tuple(int(n) for n in getattr(p, "ds_shape", p.shape))


def expert_group(p: torch.Tensor) -> str | None:
    """The name of the ranks over which a MoE layer of DeepSpeed copies an expert; None for what is no such expert's.

    `deepspeed.moe.layer.MoE` marks the parameters of its experts so: no others average their gradients over all ranks.
    """
    return None if getattr(p, "allreduce", True) else getattr(p, "group_name", None)


@dataclass(frozen=True)
class Use:
    """One place in the module tree where a parameter is registered.

    owner, role: the module whose weight it is, and the name of that weight. They differ from `module` and `attribute`
    where torch keeps a wrapped weight elsewhere: `parametrizations.weight.original`, `weight_v`, `weight_orig`.
    """

    fqn: str
    module: nn.Module
    attribute: str
    owner: nn.Module
    role: str


def uses_of(model: nn.Module) -> list[tuple[nn.Parameter, list[Use]]]:
    """Every parameter of the model with the places where it is registered (several for a tied one)."""
    found: dict[int, tuple[nn.Parameter, list[Use]]] = {}
    owners: dict[int, tuple[nn.Module, str]] = {}  # of the lists of parametrizations
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
    """`weight` for `weight_v` and the like, where the module keeps no parameter of that name."""
    for ending in _OLD_WRAPPERS:
        base = attribute.removesuffix(ending)
        if base != attribute and base not in module._parameters and hasattr(module, base):
            return base
    return attribute


def kind_of(use: Use) -> Kind | None:
    """The role of a parameter by the type of its module; None for an unknown type.

    Subclasses count as their parents. So do modules with the interface of `nn.Linear` or `nn.Embedding` (`in_features`
    and `out_features`, `num_embeddings` and `embedding_dim`), as tensor-parallel and quantized layers have it.
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
    """transformers' Conv1D of GPT-2, a linear layer that keeps (in, out)."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def offered(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """The results of each submodule's `method()` (Hugging Face models, wrapped ones too), without None."""
    for module in model.modules():
        if callable(offer := getattr(module, method, None)):
            with contextlib.suppress(NotImplementedError, AttributeError):  # backbones without a text embedding
                if isinstance(found := offer(), nn.Module):
                    yield found


def is_transposed(use: Use, shape: tuple[int, ...]) -> bool:
    """transformers' Conv1D keeps (in, out); its fused experts say so themselves (`is_transposed`, gpt-oss, Aria)."""
    if len(shape) == 2:
        return use.role == "weight" and is_conv1d(use.owner)
    return len(shape) == 3 and getattr(use.module, "is_transposed", False) is True


def storage_of(p: torch.Tensor) -> tuple[int, int, int] | None:
    """(storage, offset, elements): equal for two parameters that are the same memory; None if there is none."""
    local = getattr(p, "_local_tensor", p)
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        if local.numel() and local.untyped_storage().nbytes():
            return local.untyped_storage()._cdata, int(local.storage_offset()), int(local.numel())
    return None
