"""What a run will cost, from its configuration alone: memory, bytes, balance, time.

Re-exports nothing: the command line imports `planner.cli`, and must not wait for torch.
"""
