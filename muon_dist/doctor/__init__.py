"""`muon-dist doctor`: versions, devices, limits, network and the links between machines, each with a plain verdict."""

from muon_dist.doctor.verdict import Verdict, worst

__all__ = ["Verdict", "worst"]
