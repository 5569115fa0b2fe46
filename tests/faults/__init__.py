"""Campaigns against kogia: commands killed at any moment, and everything that is read, mutated.

Short ones run as tests; `python benchmarks/faults.py` runs long ones.
"""
