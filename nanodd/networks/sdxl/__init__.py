"""SDXL-Turbo: text to 512-pixel pictures in one to four network calls, in plain torch."""
