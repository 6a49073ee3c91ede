"""Records, text and images, up to a batch."""
