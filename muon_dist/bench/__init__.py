"""Micro-benchmarks and the comparison with other Muon optimizers, paired in one run."""
