"""Datasets on disk: records in Parquet shards behind a manifest, what writes them, reads them and finds damage."""

SCHEMA_VERSION = 4
"""1 had neither shapes nor the sizes of row groups in its manifest (`manifest.read_manifest` adds them); 2 lacked the
columns ``contoured_<view>`` and some labels, 3 ``affine_<view>`` (`current` adds them, empty).
"""
