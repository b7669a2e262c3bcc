"""Messages of a step: fragments to the owners, and updates back."""

from muon_dist.exchange.schedule import Bucket, bucket_elements, bytes_sent, make_buckets
from muon_dist.exchange.transport import Transport

__all__ = ["Bucket", "Transport", "bucket_elements", "bytes_sent", "make_buckets"]
