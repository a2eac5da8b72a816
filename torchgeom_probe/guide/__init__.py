"""The guide: what the numbers mean, which estimator to take, and what to do when a measurement is refused.

.. include:: reading.md
.. include:: choosing.md
.. include:: monitoring.md
.. include:: boundary.md
.. include:: tokens.md
.. include:: data.md
.. include:: loss.md
.. include:: troubleshooting.md
.. include:: mathematics.md
.. include:: paper.md
"""
