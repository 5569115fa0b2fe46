"""Kernels for a CPU, in C++: `kernels.cpp`, compiled once for the processor it runs on (`build.py`)."""
