"""Keeps a Mosquitto in step with who may speak: its ACL, its revocation list, its open sessions."""
