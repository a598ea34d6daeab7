"""From videos to a dataset of latents."""
