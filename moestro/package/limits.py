"""Hard bounds that every reader checks before it allocates or loops (specification 8.4, our choice)."""

PIECE_BYTES = 1 << 20
"""Decoded bytes under one leaf of a tensor's digest; a constant of the format, since a model's identity rests on it."""
CHUNK_BYTES = 1 << 20
"""Default of `chunk_size`: stored bytes under one leaf of a file's or model's tree."""
MIN_CHUNK_BYTES = 1 << 16
MAX_CHUNK_BYTES = 1 << 24
ALIGNMENT = 64
"""Every tensor and segment begins at a multiple of this many bytes."""
MIN_ALIGN_LOG2, MAX_ALIGN_LOG2 = 6, 21
MAX_DESCRIPTOR_BYTES = 64 << 20
MAX_MANIFEST_BYTES = 64 << 20
MAX_MANIFEST_FILES = 1_000_000
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
MAX_JSON_INT = 2**53 - 1
MAX_SEGMENT_BYTES = 512 << 20
"""A decoded segment, for example the graph."""
MAX_FILE_BYTES = 2**53
MAX_TENSORS = 1_000_000
MAX_SEGMENTS = 4096
MAX_MODELS = 4096
MAX_RANK = 8
MAX_NAME_BYTES = 512
MAX_RECIPIENTS = 64
MAX_CHAIN = 64
"""Longest chain of residuals a reader accepts."""
ANCHOR_EVERY = 16
"""Producers should publish a full package at least this often."""
MAX_PATH_BYTES = 1024
MAX_COMPONENT_BYTES = 255
