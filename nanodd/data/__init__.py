"""Image sets: what is learned, what is tested on."""
