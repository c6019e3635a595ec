"""An application around torch_ext, run from a checkout or an image: `python -m deploy {export,serve}`.

It is never installed into site-packages. `deploy.bundle` and `deploy.texts` need the standard library only; everything
else is imported by the command that needs it.
"""
