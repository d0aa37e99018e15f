"""The only training loop, its hooks and optimisers, and runs that survive a kill."""
