"""A run's configuration: every key with its type, default and check (schema), and how YAML becomes it (reading)."""

from aipo.config.reading import CONFIG_FOLDER, Config, dump_config, help_keys, help_sources, load_config

__all__ = ["CONFIG_FOLDER", "Config", "dump_config", "help_keys", "help_sources", "load_config"]
