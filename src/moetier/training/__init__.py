"""Training models whose experts do not fit in fast memory."""
