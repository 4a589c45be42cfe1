"""The device's side: agent, A/B slots, boot loader model, fleet simulator."""
