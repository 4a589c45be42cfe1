"""What a process tells people and programs about itself: structured logs and Prometheus metrics.

Lowest layer, beside `models`: imports nothing of Tidegate, so that every process can use it.
"""
