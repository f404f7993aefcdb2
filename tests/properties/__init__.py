"""Random calls through every door, checked against the reference and against algebra.

`cases` draws them, `doors` makes the calls, `laws` states the algebra, `audit` runs many and writes
the page docs/audit.md.
"""
