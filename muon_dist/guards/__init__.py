"""Checks during a run, for every framework: hanging ranks, loss spikes, copies that differ, slow ranks."""
