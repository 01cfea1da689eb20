"""Adapters for what users already have. Each module imports its library only when it is called."""
