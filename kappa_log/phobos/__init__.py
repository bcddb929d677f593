"""Coming from Phobos DB Checkpoint: its tables and its configuration."""
