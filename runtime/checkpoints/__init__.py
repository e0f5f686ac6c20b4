"""Checkpoints: what lies in a model folder, whether it may be loaded, and what can be made of it.

What judges a folder reads headers and imports no torch: inspect, profile, adapter, from folder, model_config,
weights, gguf_header and contents, which are the gates for what somebody else wrote. What makes another one of it
reads tensors, a piece at a time: convert and merge, from a model_folder, zero or sharded, to output or gguf. What
brings it into the store: model_import, from an import_source to a model_store.
"""
