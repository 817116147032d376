"""One denoising step: the sequence it is made in (`canvas`) and what it commits (`policy`).

What it has to know of a distribution is in `reading`, what it draws in `noise`.
"""
