"""The compiled inner loops, and what they compute in numpy where there is no compiler. Torch-free.

Every function has one meaning and two implementations: C++ in ``native/src``, called through ctypes, and numpy.
"""
