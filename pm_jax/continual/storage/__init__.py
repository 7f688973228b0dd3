"""What a run keeps in its work directory."""
