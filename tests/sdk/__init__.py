"""AWS's own device SDKs, unmodified, as judges of the device protocol."""
