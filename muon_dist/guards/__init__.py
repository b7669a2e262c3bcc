"""What watches a run, whatever the framework: hanging ranks, spikes of the loss, copies that differ, slow ranks."""
