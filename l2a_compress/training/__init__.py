"""Training: data, objective, trainer and the artifact it leaves.

This module is light: it imports no deep-learning framework, its submodules do.
"""
