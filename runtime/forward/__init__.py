"""One forward, over a root and its drafts.

`cache` says where states live in it, `pack` how they lie in its rows. `request` plans what is read
off it and `readout` reads that, where the device is not the host; `evaluation` is what it says.
"""
