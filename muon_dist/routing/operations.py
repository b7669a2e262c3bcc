"""Torch operations by name, and their effects on a weight."""

from __future__ import annotations

PRODUCTS = {"matmul", "mm", "bmm", "dot", "mv", "_grouped_mm", "grouped_mm", "_scaled_mm", "inner", "__matmul__"}
ADDED_PRODUCTS = {"addmm", "baddbmm", "addbmm", "addmv"}
LOOKUPS = {"embedding", "embedding_bag", "index_select", "gather", "take", "take_along_dim"}
WRITES = {"index_copy", "index_add", "index_put", "scatter", "scatter_add", "masked_scatter", "copy"}
TURNS = {"t", "transpose", "swapaxes", "adjoint", "swapdims"}
ADDS = {"add", "sub", "where", "lerp", "rsub", "masked_fill", "maximum", "minimum"}
SCALES = {"mul", "div", "addcmul", "pow"}
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
CHOICES = {"softmax", "log_softmax", "argmax", "multinomial", "sigmoid", "gumbel_softmax", "Categorical"}
# Operations whose result depends only on the first operand.
FIRST_ALONE = {
    "to",
    "type",
    "type_as",
    "view",
    "view_as",
    "reshape",
    "reshape_as",
    "expand",
    "expand_as",
    "repeat",
    "repeat_interleave",
    "chunk",
    "split",
    "unflatten",
    "narrow",
    "interpolate",
}
# Operations whose result has no tensor's values: shapes, dtypes, new tensors.
NO_VALUES = {
    "size",
    "numel",
    "dim",
    "isinstance",
    "len",
    "getattr",
    "hasattr",
    "range",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "is_floating_point",
    "numpy",
    "item",
    "id",
    "print",
}
# Attributes of a tensor without its values.
NO_VALUE_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "grad", "itemsize"}


def is_convolution(name: str) -> bool:
    return name.startswith(("conv1d", "conv2d", "conv3d", "conv_transpose", "causal_conv1d"))


def is_loss(name: str) -> bool:
    return "loss" in name.lower() or "cross_entropy" in name or name == "kl_div"


def field_mark(name: str) -> str:
    """The mark for a field of a model's output, by the field's name."""
    return "logits" if name.endswith("logits") or name == "loss" else "feature"


def contraction(equation: str, position: int) -> tuple[bool, bool | None, bool]:
    """How `torch.einsum(equation, ...)` uses the weight at `position` among its operands.

    Returns whether one of its axes is summed, whether its input axis comes before its output axis (None unless it has
    one axis of each kind), and whether a third axis only counts matrices.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if position >= len(operands):
        return True, None, True
    weight = operands[position].replace("...", "")
    rest = "".join(o for i, o in enumerate(operands) if i != position)
    summed = [c for c in weight if c in rest and c not in output]
    kept = [c for c in weight if c not in rest]
    counted = [c for c in weight if c in rest and c in output]
    inputs_first = weight.index(summed[0]) < weight.index(kept[0]) if len(summed) == len(kept) == 1 else None
    return bool(summed), inputs_first, len(weight) < 3 or counted == [weight[0]]
