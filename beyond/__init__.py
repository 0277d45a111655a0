"""What is in neither paper. Each file stands on lomdm.py or a3.py, never the other way."""
