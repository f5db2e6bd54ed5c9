"""Hold a cache to what it says of itself, and to the teacher that it says it has."""

from pipeline.cache.verify.live import recompute
from pipeline.cache.verify.report import Problem, Recomputed, VerifyReport
from pipeline.cache.verify.run import verify_cache
from pipeline.cache.verify.sample import LiveTeacher, load_live

__all__ = ["LiveTeacher", "Problem", "Recomputed", "VerifyReport", "load_live", "recompute", "verify_cache"]
