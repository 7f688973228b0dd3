"""The files that a run keeps in its work directory."""
