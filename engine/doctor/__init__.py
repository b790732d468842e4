"""`stopgo doctor`: what a machine has, what is wrong with it, and what held a run back.

A probe is a function that looks at one thing and returns lines; each file here has a table of them. Nothing outside the
standard library is imported before a probe needs it, so that a page comes out where half of the packages are missing.
"""
