"""The former place of `muon_dist.adapters.hf.attention`: what others have imported from here stays until 1.0."""

from muon_dist.adapters.hf.attention import attach

__all__ = ["attach"]
