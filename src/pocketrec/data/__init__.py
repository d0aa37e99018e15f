"""From raw logs to ids: sources, splits, encoding, sampling."""
