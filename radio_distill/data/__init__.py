"""Shards of pictures in, batches of views out.

The way of a picture: ``shards`` finds (and makes) tar files, ``index`` checks them and knows where
every member lies, ``position`` says which sample is next, ``reader`` fetches its bytes, ``images``
decodes it and cuts a view, ``loader`` makes batches of views. ``folder`` is the short way for
held-out pictures, ``check`` reads everything once and reports.
"""
