"""Measures an artifact at a list of budgets.

``frontier.evaluate`` returns a report, and ``report.write_report`` leaves it in a folder.

    held-out problems -> allocations per point -> generation or likelihood -> points -> report, pictures, page

Import from the modules: ``frontier`` (evaluate), ``report`` (Report, write_report), ``values`` (Point), ``baselines``.
"""
