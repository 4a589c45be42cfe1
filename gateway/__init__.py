"""The devices' door: MQTT to PostgreSQL in batches, answers after commit."""
