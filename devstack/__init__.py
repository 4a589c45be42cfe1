"""The embedded servers of `starter.py up`: PostgreSQL, Temporal, MQTT broker, artifact server, worker, gateway."""
