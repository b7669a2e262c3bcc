"""Files that start a run: scripts for torchrun and sbatch, Kubernetes manifests, hostfiles. Nothing is started."""

from muon_dist.launcher.hosts import render_accelerate, render_hostfile
from muon_dist.launcher.job import Job, parse_nodes
from muon_dist.launcher.kubernetes import Kubernetes, render_kubernetes
from muon_dist.launcher.slurm import Slurm, render_slurm
from muon_dist.launcher.torchrun import render_torchrun

__all__ = [
    "Job",
    "Kubernetes",
    "Slurm",
    "parse_nodes",
    "render_accelerate",
    "render_hostfile",
    "render_kubernetes",
    "render_slurm",
    "render_torchrun",
]
