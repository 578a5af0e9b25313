"""The programs that benchmarks start with mpirun."""
