"""What methods share: pruning, thresholds, retraining, distillation, mixed dimension, compositional embeddings, coding."""
