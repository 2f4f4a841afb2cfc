"""Models in an S3 store and in the cache of a machine: fetched once, checked by digest, before an engine starts."""

from store.weights.cache import WeightCache
from store.weights.manifest import MANIFEST, Manifest
from store.weights.remote import Remote, place_of

__all__ = ["MANIFEST", "Manifest", "Remote", "WeightCache", "place_of"]
