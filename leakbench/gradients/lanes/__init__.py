"""Whole evaluations with the trials innermost, compiled by a C++ compiler: ``kernels.cpp`` has the mathematics."""
