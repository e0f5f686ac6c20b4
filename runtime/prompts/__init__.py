"""Prompts: how a text or a conversation becomes what a model reads."""
