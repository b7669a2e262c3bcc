"""Validation loss of language models: plain cross entropy, independent of the number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from muon_dist.numerics.token_losses import token_losses

_CAUSAL = frozenset(
    name
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for name in ([names] if isinstance(names, str) else names)
)


class PlainLoss:
    """Mixin for Trainer: the evaluation loss is the sum of all losses divided by the number of all tokens.

    Trainer averages the means of batches, and fills the last batches with samples from the beginning, so its result
    depends on the number of processes. Its loss also includes label smoothing and auxiliary losses. For models that
    are not causal language models, and for user-defined losses, Trainer's evaluation stays. List this class before
    Trainer in the bases.
    """

    _rows: list[torch.Tensor] | None = None

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if self._rows is None or not self._is_language_model(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        trainer: Any = self
        if not prediction_loss_only:
            found = super().prediction_step(model, inputs, False, ignore_keys)  # type: ignore[misc]
            logits = found[1][0] if isinstance(found[1], tuple) else found[1]
            rows = token_losses(logits, inputs["labels"])
        else:
            prepared = trainer.on_device(inputs)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                outputs = model(**{name: value for name, value in prepared.items() if name != "labels"})
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            rows = token_losses(getattr(logits, "full_tensor", lambda: logits)(), prepared["labels"])
            sums = rows.sum(dim=0)
            found = (sums[0] / sums[1].clamp(min=1), None, None)
        self._rows.append(trainer.gather_function(rows))  # each sample once, in the data's order
        return found

    def _is_language_model(self, inputs: Mapping[str, Any]) -> bool:
        trainer: Any = self
        parallel = getattr(trainer.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.cp_enabled:
            return False  # a rank holds only a part of each sample (under Ulysses only in training)
        labels = inputs.get("labels")
        if trainer.compute_loss_func is not None or not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            return False
        bare = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if hasattr(bare, "get_base_model"):  # PEFT
            bare = bare.get_base_model()
        return any(kind.__name__ in _CAUSAL for kind in type(bare).__mro__)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._rows = []
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            rows = torch.cat(self._rows).double().cpu() if self._rows else None
        finally:
            self._rows = None
        if rows is not None and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = _mean(rows)
            output.metrics.update(self.source_figures(dataloader.dataset, rows, metric_key_prefix))
        return output

    def source_figures(self, dataset: Any, rows: torch.Tensor, prefix: str) -> dict[str, float]:
        """Log figures per source of `dataset`. rows: loss and tokens of each sample, (samples, 2)."""
        names, lengths = getattr(dataset, "names", ()), getattr(dataset, "lengths", ())
        if len(names) < 2 or sum(lengths) != len(rows):
            return {}
        parts = rows.split(list(lengths))
        return {f"{prefix}_loss/{name}": _mean(part) for name, part in zip(names, parts, strict=True)}

    def trains_on_plain_loss(self) -> bool:
        """Whether the training loss is only the cross entropy, so that it can be converted to bits per byte."""
        trainer: Any = self
        smoothed = trainer.args.label_smoothing_factor > 0 or trainer.compute_loss_func is not None
        return not smoothed and not getattr(getattr(trainer.model, "config", None), "output_router_logits", False)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        drop, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
        try:  # drop nothing: dropped samples would depend on the number of processes
            return super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]
        finally:
            trainer.args.dataloader_drop_last = drop


def _mean(rows: torch.Tensor) -> float:
    """Mean loss in nats per token. rows: loss and tokens of each sample, (samples, 2) in float64."""
    sums = rows.sum(dim=0)
    return (sums[0] / sums[1]).item() if sums[1] > 0 else float("nan")
