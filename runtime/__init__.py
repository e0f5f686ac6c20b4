"""Models and where they run: engines, workers, the gateway. Knows no SQL and no DuckDB."""
