"""Training of one-step super-resolution models."""
