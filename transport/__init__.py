"""MQTT clients of the server's side: the only importer of gmqtt and aiomqtt outside agent/."""
