"""Measured rollouts of simulated devices against the embedded stack; see `bench/__main__.py`.

What is real: every server and process of Tidegate, MQTT, the signatures and their verification by each device, the
workflow. What is not: downloads, flash and reboots take no time.
"""
