"""What diffusion.py and minimax.py stand on."""
