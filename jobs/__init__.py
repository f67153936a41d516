"""The commands: thin mains over kmtr."""
