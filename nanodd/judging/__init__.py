"""What train_eval.py stands on."""
