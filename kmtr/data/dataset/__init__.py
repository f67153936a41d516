"""Datasets on disk: records in Parquet shards behind a manifest, what writes them, reads them and finds damage."""
