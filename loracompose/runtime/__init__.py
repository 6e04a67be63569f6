"""What runs inside the model: hooks and the batched low-rank product."""
