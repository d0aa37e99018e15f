"""PocketRec: fit the embedding tables of recommender systems into any memory budget and ship them to devices."""
