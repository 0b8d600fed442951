"""What sample.py stands on."""
