"""One denoising step: the sequence it is made in (`canvas`) and what it commits (`policy`)."""
