"""Training models whose experts do not fit: backward, gradients, optimizers and checkpoints, record by record."""
