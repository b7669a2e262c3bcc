"""Self-contained HTML pages from records on disk."""
