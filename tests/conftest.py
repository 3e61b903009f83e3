"""Hypothesis: an ordinary profile, and `--hypothesis-profile=thorough` for a long search."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ordinary", deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("ordinary"), max_examples=10_000)
settings.load_profile("ordinary")
