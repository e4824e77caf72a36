"""`vlsi-fast inspect`: what a folder holds. folders.py tells kinds apart, runs.py and models.py look into them."""
