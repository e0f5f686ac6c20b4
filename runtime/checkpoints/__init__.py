"""Checkpoints: what lies in a model folder, and whether it may be loaded. Reads headers, never weights."""
