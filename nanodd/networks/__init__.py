"""Networks, their checkpoints and their training: used by diffusion.py, minimax.py and sample.py."""
