"""Datasets and the mappers that turn their records into what the model takes."""
