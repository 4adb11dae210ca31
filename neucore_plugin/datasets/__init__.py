"""Readers: annotation files to triplets and galleries. Nothing heavy is imported here."""
