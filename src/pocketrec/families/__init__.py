"""What methods share: pruning, thresholds, retraining, distillation, mixed dimension, composition, coding."""
