"""How many drafts pay.

`controller` learns it while decoding: what it knows is in `learned` and `estimates`, what tries may
lose in `tries`. `shared` has one for every number of sequences that share forwards, and `auto`
connects it to the decode loop. `timed` measures beforehand, `cost` remembers that, and `predict`
says what drafts bring by it; `roofline` does for other machines.
"""
