"""The command `topk`; cli/main.py lists what it can do."""
