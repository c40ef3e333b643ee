"""Models on disk: pulled from anywhere, converted once, checked when opened."""
