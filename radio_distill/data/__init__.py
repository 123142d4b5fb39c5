"""Shards of images in, batches of views out.

The way of an image: ``find`` finds tar files (``shards`` makes them), ``tar_scan`` checks them,
``tar_index`` keeps where every member lies, ``sources`` says which shards are in use, and
``curation`` which of their samples, ``order`` which sample is next, ``tar_reader`` fetches its
bytes, ``images`` decodes it and cuts a view (``bands`` what is no photograph),
``loader`` makes batches of views in processes of its own, and counts what turns out bad, ``device``
takes them where they are worked on. Shards that lie elsewhere are ``remote``, with copies in a
``cache`` that is filled ``ahead``. ``folder`` is the short way for held-out images, ``check`` reads
everything once and reports.
"""
