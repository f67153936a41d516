"""The commands: thin mains over kmtr."""

from kmtr.cli import main, recipe_config

__all__ = ["main", "recipe_config"]
