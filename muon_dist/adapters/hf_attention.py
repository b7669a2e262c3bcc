"""Old module name of `muon_dist.adapters.hf.attention`; kept until 1.0 for existing imports."""

from muon_dist.adapters.hf.attention import attach

__all__ = ["attach"]
