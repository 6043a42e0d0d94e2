"""Several runs and what they say together: runs in, one report out."""
