"""Independent proof of what an optimizer does: one matrix at a time, against plain formulas on whole tensors."""
