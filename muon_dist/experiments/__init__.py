"""The paper (arXiv 2605.13079), measured: experiments E1 to E8 and the Newton-Schulz study. See docs/theory.md.

This file imports nothing, because the command line imports ``experiments.cli`` and must answer --help at once.
"""
