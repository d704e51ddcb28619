"""How fast leakbench is: against its own one-at-a-time loop, against breaching, and against the machine.

``python -m benchmarks.speed`` measures and writes ``reports/speed``; ``python -m benchmarks.speed.parity`` compares
success rates; ``python -m benchmarks.speed.report`` writes tables and plots from what was measured before;
``python -m benchmarks.speed.factorisation`` measures the closed form of a convolution.
"""
