"""How fast a batch of different compositions runs, beside the base model and other ways to run it."""
