"""Training of single adapters and of what composers learn."""
