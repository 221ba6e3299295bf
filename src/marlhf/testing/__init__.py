"""Laws that segmenters, estimators and rewards obey, for test suites of their own.

    from marlhf.testing import check_estimator, check_reward, check_segmenter

Each raises AssertionError, saying which law was broken and on which input.
"""

from marlhf.testing.estimators import check_estimator
from marlhf.testing.rewards import check_reward
from marlhf.testing.segmenters import check_segmenter

__all__ = ["check_estimator", "check_reward", "check_segmenter"]
