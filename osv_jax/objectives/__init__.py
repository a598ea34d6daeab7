"""Training objectives: the losses and one readable step for each stage."""
