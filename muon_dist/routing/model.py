"""What a model says about its parameters: where each is registered, embeddings, the output head, logical shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
CONVOLUTIONS = nn.modules.conv._ConvNd


def logical_shape(p: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter.

    DeepSpeed's `zero.Init` partitions a parameter before anyone sees it and leaves the shape (0,); the whole shape
    is then in `ds_shape`. A DTensor reports its global shape by itself.
    """
    return tuple(int(n) for n in getattr(p, "ds_shape", p.shape))


@dataclass(frozen=True)
class Use:
    """One place in the module tree where a parameter is registered."""

    fqn: str
    module: nn.Module
    attribute: str


def uses_of(model: nn.Module) -> list[tuple[nn.Parameter, list[Use]]]:
    found: dict[int, tuple[nn.Parameter, list[Use]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                fqn = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), (parameter, []))[1].append(Use(fqn, module, attribute))
    return list(found.values())


def _modules_offered(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """What each submodule's `method()` returns (Hugging Face models, also when wrapped), None left out."""
    for module in model.modules():
        if callable(offer := getattr(module, method, None)):
            with contextlib.suppress(NotImplementedError, AttributeError):  # backbones without a text embedding
                if isinstance(offered := offer(), nn.Module):
                    yield offered


def _weight_ids(modules: Iterator[nn.Module] | Sequence[nn.Module]) -> set[int]:
    return {id(m.weight) for m in modules if isinstance(getattr(m, "weight", None), nn.Parameter)}


def embedding_weights(model: nn.Module) -> set[int]:
    """`id()` of the weights of every embedding module, and of what `get_input_embeddings()` returns."""
    tables = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    return _weight_ids([*tables, *_modules_offered(model, "get_input_embeddings")])


def output_head(model: nn.Module) -> set[int]:
    """`id()` of the weight of the output head, if the model has one (a set, since some models have several).

    It is what `get_output_embeddings()` returns where the model, or a module inside it, offers that. Otherwise it is
    the `nn.Linear` whose (out, in) equals (num_embeddings, embedding_dim) of an embedding of the model: the one with
    most rows (a vocabulary is larger than a table of positions), and the last of these in module order.
    """
    offered = _weight_ids(_modules_offered(model, "get_output_embeddings"))
    if offered:
        return offered
    tables = {logical_shape(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and logical_shape(m.weight) in tables]
    largest = max(reversed(heads), key=lambda m: logical_shape(m.weight)[0], default=None)
    return _weight_ids([largest] if largest is not None else [])


def is_transposed(use: Use, shape: tuple[int, ...]) -> bool:
    """transformers' Conv1D keeps (in, out); its fused experts say so themselves (`is_transposed`, gpt-oss, Aria)."""
    if len(shape) == 2:
        return use.attribute == "weight" and any(c.__name__ == "Conv1D" for c in type(use.module).__mro__)
    return len(shape) == 3 and getattr(use.module, "is_transposed", False) is True
