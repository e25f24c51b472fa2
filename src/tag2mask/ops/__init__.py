"""Pure tensor functions, each with its equation."""
