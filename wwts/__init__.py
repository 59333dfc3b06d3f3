"""What infer.py imports where it needs more than it has itself: its own models, files that are resumed, memory."""
