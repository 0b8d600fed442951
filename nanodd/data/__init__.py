"""Data sets: the images to train on and the images to test on."""
