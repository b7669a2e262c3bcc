"""DeepSpeed: where ZeRO 0, 1, 2 and 3 store Muon's tensors, and which settings cannot be exact.

The only package that knows DeepSpeed (0.19.8; attributes by that version). Nothing is patched on a class and nothing
is set on a parameter: a `use_muon` attribute would make DeepSpeed orthogonalize as well.
"""

from muon_dist.adapters.deepspeed.checks import check_config, check_partitioned, check_zero_settings
from muon_dist.adapters.deepspeed.engine import attach, bind, prepare_process

__all__ = ["attach", "bind", "check_config", "check_partitioned", "check_zero_settings", "prepare_process"]
