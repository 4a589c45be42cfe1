"""The devices' other door: enrolment over HTTPS, by EST (RFC 7030)."""
