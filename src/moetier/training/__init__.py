"""Training models whose experts do not fit: gradients, optimizers and their state, record by record."""
