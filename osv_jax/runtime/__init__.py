"""What the programs need around a step: devices, checkpoints, metrics."""
