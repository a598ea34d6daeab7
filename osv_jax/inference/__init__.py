"""From an image and a trained student to a video."""
