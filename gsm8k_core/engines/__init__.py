"""Engines: token ids in; completions with token ids, log-probs and a finish reason out."""
