"""Whether a step fits devices that need not be there, and what it costs on them."""
