"""How good a model is: metrics, benchmark sets and reports."""
