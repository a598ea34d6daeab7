"""Training objectives, one file each, and what they share."""
