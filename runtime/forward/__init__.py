"""One forward: where states live in it (`cache`), and how they lie in its rows (`pack`)."""
