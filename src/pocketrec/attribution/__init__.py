"""What each stored scalar is worth to the loss: games, estimators, and the scores of a table."""
