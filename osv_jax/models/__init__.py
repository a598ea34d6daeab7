"""Pure Flax (Linen) networks: no losses, no files, no sharding rules."""
