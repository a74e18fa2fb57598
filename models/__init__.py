"""Network classes that diffusers does not have."""
