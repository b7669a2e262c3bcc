"""Independent checks of an optimizer's steps: one matrix at a time, against plain formulas on whole tensors."""
