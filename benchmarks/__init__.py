"""Speed as ratios that hold on another machine. Read `benchmarks/README.md`; run `python -m benchmarks`."""
