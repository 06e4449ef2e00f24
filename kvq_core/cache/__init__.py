"""The paged cache."""
