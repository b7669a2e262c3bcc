"""The cost of a run, computed from its configuration: memory, bytes, balance, time.

Re-exports nothing: the command line imports `planner.cli`, and should not wait for the import of torch.
"""
