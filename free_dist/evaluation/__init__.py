"""What early exits cost in quality and gain in time: metrics, paired clock, probes, report."""
