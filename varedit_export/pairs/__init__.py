"""Pairs to fine-tune on: a source, its right result, and the instruction between them.

    place -> read_pairs -> Pairs -> [filter by a judge] -> training

`read.py` finds what kind of data a place holds; each kind has a file: `lists.py`, `groups.py`,
`columns.py`. `stored.py` reads the pictures. All data comes from strangers.
"""
