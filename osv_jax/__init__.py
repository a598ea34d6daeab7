"""One-step image-to-video distillation (OSV) in JAX and Flax."""

__version__ = "0.1.0"
