"""Bytes in, bytes out: manifests, signatures, deltas, anti-rollback. Never fetches, never looks at a clock.

Bytes, trusted state and the time come in; a typed result or an exception goes out. Key files (keys.py) are the one
thing read or written here.
"""
