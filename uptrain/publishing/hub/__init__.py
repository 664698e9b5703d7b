"""Publish a checkpoint on the Hugging Face Hub: checks, model card, upload."""
