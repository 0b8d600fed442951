"""Judges (classifiers trained from scratch on a small set alone) and baselines: used by train_eval.py."""
