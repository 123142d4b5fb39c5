"""Shards of images in, batches of views out.

The way of a image: ``shards`` finds (and makes) tar files, ``walk`` checks them, ``index`` keeps
where every member lies, ``sources`` says which shards are in use, ``position`` which sample is
next, ``reader`` fetches its bytes, ``images`` decodes it and cuts a view, ``loader`` makes batches
of views, in the processes of ``workers``. What turns out bad stands in ``tally``; ``patience``
waits for disks and ``names`` makes names fit for a log. ``folder`` is the short way for held-out
images, ``check`` reads everything once and reports.
"""
