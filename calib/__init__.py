"""Offline calibration: prompts, recorded decodes, draft graphs."""
