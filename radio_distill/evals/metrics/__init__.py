"""Metrics: pure functions on tensors, and sums over a whole set fed batch by batch.

One file a kind of prediction. A metric of single images returns one value an image; a metric of a
set is a ratio of sums, not a mean of ratios of batches, and is a class that adds up in float64,
over batches and processes (:class:`.sums.Sums`). Where published numbers come out of a program with
a mistake in it, ``as_published=True`` repeats the mistake, and the default is right.
"""

IGNORED = -1
"""Label of pixels that are of no class."""
