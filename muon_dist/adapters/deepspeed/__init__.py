"""DeepSpeed: where ZeRO 0, 1, 2 and 3 store Muon's tensors, and which settings cannot be exact.

Only this package depends on DeepSpeed (attribute names of version 0.19.8). It patches no class and sets no attribute
on a parameter: `use_muon` would make DeepSpeed orthogonalize too.
"""

from muon_dist.adapters.deepspeed.checks import check_config, check_partitioned, check_zero_settings
from muon_dist.adapters.deepspeed.engine import attach, bind, prepare_process

__all__ = ["attach", "bind", "check_config", "check_partitioned", "check_zero_settings", "prepare_process"]
