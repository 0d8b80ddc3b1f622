"""Adapters for models and trainers of other projects. Each module imports the project that it is named after."""
