"""I/O steps of workflows: one class per collaborator, dependencies as dataclass fields."""
