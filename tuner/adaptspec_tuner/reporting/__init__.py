"""What a run found, as data, tables and HTML."""
