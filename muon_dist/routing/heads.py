"""The blocks inside a model's weights: attention heads, parts of latent attention, fused gate and up.

The size of a head is an attribute of the attention modules of transformers and torch. The output projection is found
from the source of `forward`, because names differ between models.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from muon_dist.routing.evidence import projections
from muon_dist.routing.model import is_conv1d, logical_shape
from muon_dist.routing.origins import Reading
from muon_dist.routing.source import read
from muon_dist.routing.table import Split

# Names of the head size in attention modules of transformers and torch.
_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_FUSED = "gate_up_proj"
Found = dict[int, Split | str]


def blocks_of(model: nn.Module) -> Found:
    """The split of each parameter with several blocks, by `id()`: each block becomes a separate matrix.

    Q, K and V are split into heads along the outputs, also if they are fused or interleaved; the output projection is
    split along its inputs. In latent attention (MLA) each head has parts of different sizes, and all heads share one
    part. Fused gate and up projections are two matrices. Parameters with only one block are left out. If the source
    does not show which projection makes the output, the value is a sentence about this.
    """
    found: Found = {}
    beside = {id(attention): dense for module in model.modules() for attention, dense in _outputs_beside(module)}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            _torchs(module, found)
        elif "attention" in type(module).__name__.lower():
            _attention(module, name, found, id(module) in beside)
        if id(module) in beside:
            _cut(found, beside[id(module)], _size(module), "inputs")
        _gate_up(module, found)
    return found


def _size(module: nn.Module) -> int | None:
    sizes = (getattr(module, name, None) for name in _SIZES)
    return next((s for s in sizes if isinstance(s, int) and s > 0), None)


def _axes(projection: nn.Module, weight: nn.Parameter) -> tuple[int, int]:
    """(outputs, inputs)."""
    rows, cols = logical_shape(weight)
    return (cols, rows) if is_conv1d(projection) else (rows, cols)


def _cut(found: Found, projection: nn.Module, size: int | None, axis: str) -> None:
    """Record a split into blocks of one size, if the size fits."""
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not size:
        return
    length = _axes(projection, weight)[axis == "inputs"]
    if length % size == 0 and length > size:
        found[id(weight)] = Split(heads=length // size, axis=axis)  # type: ignore[arg-type]


def _attention(module: nn.Module, path: str, found: Found, output_beside: bool) -> None:
    linear = projections(module)
    latent = getattr(module, "kv_lora_rank", None) is not None
    if not linear or not (latent or _size(module)):
        return
    output = None if output_beside else _output(linear, read(module))
    if output is None and not output_beside:
        reason = f"the source of {path} ({type(module).__name__}) does not show which projection makes its output"
        found.update(dict.fromkeys((id(child.weight) for child in linear.values()), reason))
        return
    for name, projection in linear.items():
        if latent:
            _latent(module, projection, found, is_output=name == output)
        else:
            _cut(found, projection, _size(module), "inputs" if name == output else "outputs")


def _output(linear: dict[str, nn.Module], reading: Reading) -> str | None:
    """Name of the output projection: its output is returned, and is not the input of another projection."""
    returned = {o.path[0] for o in reading.returned if o.kind == "out" and len(o.path) == 1 and o.path[0] in linear}
    takers = {taker[:1] for of_one in reading.passed_on.values() for taker in of_one}
    last = [
        name
        for name in returned
        if not any(taker[0] in linear and taker[0] != name for taker in reading.passed_on.get((name,), ()))
    ]
    taking = [name for name in last if (name,) in takers]
    if len(taking) == 1:
        return taking[0]
    return last[0] if len(returned) == 1 and len(linear) > 1 else None


def _latent(module: nn.Module, projection: nn.Module, found: Found, is_output: bool) -> None:
    """Record the splits of multi-head latent attention (DeepSeek-V2 and V3); sizes come from the configuration."""
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    nope, rope, value, rank = (int(getattr(module, name, None) or 0) for name in names)
    weight = projection.weight
    if is_output:
        _cut(found, projection, value, "inputs")
        return
    assert isinstance(weight, nn.Parameter)
    outputs, inputs = _axes(projection, weight)
    config = getattr(module, "config", None)
    heads: int = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None) or 0
    if outputs == rank + rope and inputs != rank:  # the latent, and the key part that all heads share
        found[id(weight)] = Split(sizes=(rank, rope))
    elif inputs == rank and outputs == heads * (nope + value):  # keys without position, and values
        found[id(weight)] = Split(sizes=(nope, value) * heads)
    elif outputs == heads * (nope + rope):  # queries without and with position
        found[id(weight)] = Split(sizes=(nope, rope) * heads)


def _torchs(module: nn.MultiheadAttention, found: Found) -> None:
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = getattr(module, name)
        if weight is not None:
            found[id(weight)] = Split(heads=logical_shape(weight)[0] // module.head_dim)
    _cut(found, module.out_proj, module.head_dim, "inputs")


def _outputs_beside(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(attention, module with its output projection) in BERT-like models, such as `BertSelfOutput.dense`."""
    children = list(module.children())
    for attention in children:
        for other in children:
            dense = getattr(other, "dense", None)
            if _size(attention) and type(other).__name__.endswith("SelfOutput") and isinstance(dense, nn.Module):
                yield attention, dense


def _gate_up(module: nn.Module, found: Found) -> None:
    """Record the split of a fused gate and up projection, or one per expert, into two halves; not if interleaved."""
    fused = getattr(module, _FUSED, None)
    weight = fused if isinstance(fused, nn.Parameter) else getattr(fused, "weight", None)
    if isinstance(weight, nn.Parameter) and not _interleaves(module):
        found[id(weight)] = Split(heads=2)


def _interleaves(module: nn.Module) -> bool:
    """Whether gate and up outputs alternate, as in gpt-oss: then no block of rows is a separate matrix."""
    try:
        return "::2" in inspect.getsource(type(module))
    except (OSError, TypeError):
        return True
