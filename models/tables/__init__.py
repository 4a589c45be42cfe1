"""The PostgreSQL schema as SQLModel tables. Imported by store/ (and by migrations) alone.

Two sources of truth, never mixed: these tables hold what is true of each device and each execution; where a process
stands is Temporal's. Names of indexes and constraints are stable: migrations refer to them.
"""

from models.tables import health, identity, operations, registry, rollouts

__all__ = ["health", "identity", "operations", "registry", "rollouts"]
