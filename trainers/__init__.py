"""Training: `MoETrainer`, its arguments and callbacks."""
