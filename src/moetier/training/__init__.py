"""Training models whose experts do not fit: backward through experts that may have left their slots since forward."""
