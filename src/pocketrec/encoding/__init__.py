"""From raw rows to integer ids: what ``dataset.encode`` is made of."""
