"""The demo: a tiny student taught by a tiny teacher on easy-VQA, through all three stages, in minutes on a laptop."""
