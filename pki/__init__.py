"""Certificates as bytes: authorities, certificate requests, certificates, revocation lists. No I/O, no clock."""
