"""The method suite, a package for each topic: losses, modules and small objects for your own training loop, on the ops.

Nothing is imported before it is asked for: ``from tlkernels.methods import peft``.
"""
