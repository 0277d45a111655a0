"""What any project has: flags, texts, tokens, checkpoints, processes, pictures. No model."""
