"""Bytes in, bytes out: manifests, signatures, deltas, anti-rollback. Never fetches, never writes, never looks at a clock."""
