"""Verification of a cache: its files against each other, and its outputs against those of its teacher."""

from pipeline.cache.verify.recomputation import recompute
from pipeline.cache.verify.report import Problem, Recomputed, VerifyReport
from pipeline.cache.verify.sources import compare_with_sources
from pipeline.cache.verify.verification import verify_cache

__all__ = ["Problem", "Recomputed", "VerifyReport", "compare_with_sources", "recompute", "verify_cache"]
