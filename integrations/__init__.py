"""Drafts inside tools that people use already; each module needs its extra, when it is used."""
