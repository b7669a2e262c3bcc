"""Layouts: which rank holds which fragments of every matrix."""

from muon_dist.layout.fragment import (
    Fragment,
    Layout,
    Matrix,
    MatrixLayout,
    Span,
    cut_parameter,
    fragments_of_run,
)
from muon_dist.layout.replicated import replicated_layout

__all__ = [
    "Fragment",
    "Layout",
    "Matrix",
    "MatrixLayout",
    "Span",
    "cut_parameter",
    "fragments_of_run",
    "replicated_layout",
]
