"""PyTorch checkpoints to Flax parameter trees and back."""
