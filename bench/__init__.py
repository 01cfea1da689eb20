"""Microbenchmarks: what each kernel is worth on this machine, beside everything else that computes the same.

``python -m bench --family nf4 --device cpu`` runs one family. A family (`bench.nf4`) lists cases and providers
(`bench.registry`); `bench.harness` checks and times them; `bench.roofline` measures the machine's ceilings;
`bench.report` writes tables, JSON and plots.
"""
