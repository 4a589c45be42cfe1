"""Data only: typed models, identifiers, messages and errors. Nothing here does I/O or decides anything."""
