"""What talks to the broker: claims, leases, settlements, sweeps, and the Lua scripts that do them."""
