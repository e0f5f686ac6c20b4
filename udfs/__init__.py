"""DuckDB functions on one side, Arrow batches on the other. Parses nothing."""
