"""Results of finished runs, read and shown."""
