"""The web page of `inr-kernels app`: `make_page` builds it, `serve` shows it. Needs pip install 'inr-kernels[app]'.

What pictures are and how they are computed is not decided here: see `Studio`.
"""
