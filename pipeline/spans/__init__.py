"""Where a run's time goes, rank by rank: docs/OBSERVABILITY.md."""
