"""Figures: AUC, NDCG, full ranking, beyond accuracy, and their significance; torch-free."""
