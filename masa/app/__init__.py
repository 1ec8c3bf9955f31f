"""The page (`masa app`): synthesis, edits of real pictures, masks, layouts and comparisons, in a browser.

`runs` and what it calls need no browser; only `page` and `server` import gradio.
"""

from masa.app.serve import serve

__all__ = ["serve"]
