"""The Hugging Face Trainer with Muon: its training loop, checkpoints, guards and records."""
