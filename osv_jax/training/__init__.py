"""From a configuration to a trained student: set-up, the loop, its clips, its pictures."""
