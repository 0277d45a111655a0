"""What was measured, RESULTS.md, and what measures it. The models and train_char.py do without."""
