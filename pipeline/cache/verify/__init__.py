"""Hold a cache to what it says of itself, and to the teacher that it says it has."""

from pipeline.cache.verify.report import Problem, VerifyReport
from pipeline.cache.verify.run import verify_cache

__all__ = ["Problem", "VerifyReport", "verify_cache"]
